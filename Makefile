# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# OpenMP threads that wait give their core away soon: on a busy machine much faster.
export GOMP_SPINCOUNT := 20000
# Python keeps what it compiles, even where the environment says otherwise: many processes start.
export PYTHONDONTWRITEBYTECODE :=
# pip need not compile 20,000 files of which few are ever imported: Python does when it imports them.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: help demo test test-gpu suite lint style types layers docs clean
help:
	@echo "make demo   install, then adapt, fold, export and verify a real model (about 6 minutes)"
	@echo "make test   install with the test extras, then linters and the whole CPU test suite"
	@echo "make lint   ruff, its format, types, and what imports what"
	@echo "make test-gpu  the tests that need a GPU, over all cores"
	@echo "make docs   write the generated parts of the documents anew"
	@echo "make clean  remove the virtual environment and what the demo wrote"

demo: $(VENV)/.demo
	$(BIN)/fastadapt demo --out demo-out --overwrite

# The suite runs the test of layers, too. A check of types has one thread: it runs beside the suite.
test: $(VENV)/.test style
	$(MAKE) --no-print-directory -j 2 types suite

# Neighbours run in one process where they can: files share what is costly to make.
suite: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal

# With names as tests end: what is cut off has told what failed.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal -m gpu -vv

lint: types layers style

style: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/python tools/check_types.py

layers: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_layout.py

docs: $(VENV)/.test
	$(BIN)/python tools/command_docs.py
	$(BIN)/python -m fastadapt.bench.reporting.documents

# A stamp for each set of extras: a second run installs nothing.
$(VENV)/.demo: pyproject.toml | $(VENV)
	$(INSTALL) --editable ".[demo]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)
	$(INSTALL) --editable ".[demo,test]"
	@touch $@ $(VENV)/.demo

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastadapt needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) demo-out
