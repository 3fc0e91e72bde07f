"""Run the documents' snippets, and check that what they name is there."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

from tests.helpers import documents
from tests.helpers.documents import DOCUMENTS, ROOT
from tests.helpers.imagesets import make_folders

TOP = ("kernels", "fastadapt", "export", "bench", "tests", "tools", "examples", "docs")
FOLDERS = ("", ".ci", ".github", *TOP)
# What a run, a bundle or a user has, not the repository.
ELSEWHERE = re.compile(r"cache/|~|bundle/|run/|images/|val/|train/|test/|DATA|RUN")
# Options of other programs.
OTHERS = {
    "--help",
    "--no-isolation",
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--rdzv-endpoint",
    "--sets",  # python -m fastadapt.bench.suites.transfer
    "--what",
}


def named(document: Path) -> str:
    return str(document.relative_to(ROOT))


def ids(documents_: list[Path]) -> list[str]:
    return [named(document) for document in documents_]


PYTHON = [d for d in DOCUMENTS if any(b.language == "python" for b in documents.blocks(d))]
CONSOLE = [d for d in DOCUMENTS if any(True for _ in documents.command_lines(d))]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return documents.write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.mark.parametrize("document", PYTHON, ids=ids(PYTHON))
def test_python_snippets_run(document, monkeypatch, tmp_path, request):
    """The snippets of a document run one after the other, with what its comments prepare."""
    monkeypatch.chdir(tmp_path)
    documents.stand_in_for_timm(monkeypatch)
    documents.image_files(tmp_path)

    def a_bundle() -> None:
        (tmp_path / "bundle").symlink_to(request.getfixturevalue("bundle"))

    names = {
        "torch": torch,
        "a_bundle": a_bundle,
        "training_batches": documents.training_batches,
        "image_folders": lambda name: make_folders(tmp_path / name, 5),
        "stand_in_for_open_clip": lambda: documents.stand_in_for_open_clip(monkeypatch),
    }
    for block in documents.blocks(document):
        if block.language != "python":
            continue
        if block.setup.startswith("gpu;") and not torch.cuda.is_available():
            continue
        setup = block.setup.removeprefix("gpu;").strip()
        exec(compile(setup, f"{named(document)}, before line {block.line}", "exec"), names)
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(document), "exec"), names)


@pytest.mark.parametrize("document", CONSOLE, ids=ids(CONSOLE))
def test_command_lines_are_understood(document):
    for command in documents.command_lines(document):
        words = shlex.split(command)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        check = COMMANDS.get(words[0])
        assert check, f"{named(document)}: nothing is known of {command!r}"
        check(words[1:], command)


def check_fastadapt(words: list[str], command: str) -> None:
    """Parse the options as the command line does, without running anything."""
    root = command_line()
    words = [word for word in words if word != "--debug"]
    if not words or words[0].startswith("-"):
        root.make_context("fastadapt", words)
        return
    assert words[0] in root.commands, command
    try:
        root.commands[words[0]].make_context(words[0], words[1:])
    except Exception as error:
        raise AssertionError(f"{command}: {error}") from error


def command_line():
    import typer

    from fastadapt.cli import app

    return typer.main.get_command(app)


def check_make(words: list[str], command: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets), command


def check_pip(words: list[str], command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\[([\w,-]+)\]", command):
        assert set(extra.split(",")) <= set(project["optional-dependencies"]), command


def check_python(words: list[str], command: str) -> None:
    if words[0] == "-m" and words[1] not in ("pip", "pytest", "venv"):
        assert module_file(words[1]), command
    elif words[0] != "-m":
        assert (ROOT / words[0]).is_file(), command


def check_pytest(words: list[str], command: str) -> None:
    for word in words:
        if word.startswith(TOP):
            assert (ROOT / word.partition("::")[0]).exists(), command


def check_torchrun(words: list[str], command: str) -> None:
    start = words.index("-m")
    assert words[start + 1] == "fastadapt", command
    check_fastadapt(words[start + 2 :], command)


COMMANDS = {
    "fastadapt": check_fastadapt,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "pytest": check_pytest,
    "git": lambda words, command: None,
    "torchrun": check_torchrun,
}


def module_file(name: str) -> Path | None:
    """Return the file of a module or package of ours, or of the repository's top level."""
    parts = name.split(".")
    if parts[0] == "fastadapt" and len(parts) > 1 and parts[1] in ("kernels", "export", "bench"):
        parts = parts[1:]
    path = ROOT.joinpath(*parts)
    candidates = (path.with_suffix(".py"), path / "__main__.py", path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text()):
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{named(document)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{named(document)} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_files_that_are_named_exist(document):
    for code in documents.inline_code(document):
        for word in re.findall(r"[\w.*/-]+", code):
            top = word.split("/")[0]
            if "/" in word and top in TOP and "soft_pool" not in word:  # CONTRIBUTING's example
                found = list(ROOT.glob(word.rstrip("/"))) or (ROOT / word).exists()
                assert found, f"{named(document)} names {word}"
            elif re.fullmatch(r"(test_)?\w+\.(py|md)", word) and not ELSEWHERE.search(code):
                there = any(True for top in TOP for _ in (ROOT / top).rglob(word))
                assert there or (ROOT / word).exists(), f"{named(document)} names {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_options_that_are_named_exist(document):
    root = command_line()
    options = {
        option
        for command in (root, *root.commands.values())
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for code in documents.inline_code(document):
        if code.startswith(("pip ", "pytest", "python ", "git ", "ncu ")):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code):
            assert option in options | OTHERS, f"{named(document)} names {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_python_names_exist(document):
    for code in documents.inline_code(document):
        for name in re.findall(r"\b(?:fa|fastadapt)(?:\.[A-Za-z_]\w*)+", code):
            parts = name.split(".")
            found = importlib.import_module("fastadapt")
            for index, part in enumerate(parts[1:], 1):
                if not hasattr(found, part):
                    importlib.import_module(".".join(["fastadapt", *parts[1 : index + 1]]))
                found = getattr(found, part)


def test_every_environment_variable_has_its_row():
    page = (ROOT / "docs/environment-variables.md").read_text()
    rows = set(re.findall(r"^\| `(FASTADAPT_\w+)`", page, re.MULTILINE))
    used = {
        name
        for folder in ("fastadapt", "kernels", "export", "bench", "tests", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r'["\'](FASTADAPT_[A-Z_]+)["\']', path.read_text())
    }
    assert rows == used


def test_the_page_of_options_is_current():
    """After a change: make docs."""
    from tools import command_docs

    assert command_docs.TARGET.read_text(encoding="utf-8") == command_docs.render()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
