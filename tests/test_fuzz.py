"""A few damaged inputs of every kind, as ``tools/fuzz.py`` gives thousands."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.fuzz.checkpoints import Checkpoints, Safetensors
from tests.helpers.fuzz.folders import PeftFolders, Runs
from tests.helpers.fuzz.images import Images
from tests.helpers.fuzz.target import RAW, REFUSED, WRONG, Target, answer
from tests.helpers.fuzz.targets import run_case
from tests.helpers.fuzz.texts import Listings, Lists, Tables

TOOL = Path(__file__).parents[1] / "tools" / "fuzz.py"
EXAMPLES = {Images: 60, Tables: 40, Listings: 30, Lists: 20, Safetensors: 20, Checkpoints: 25}
EXAMPLES |= {Runs: 6, PeftFolders: 5}


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_damaged_inputs_are_answered_rightly(kind, tmp_path_factory):
    target = kind(tmp_path_factory.mktemp("sound"))

    @settings(max_examples=EXAMPLES[kind], derandomize=True, database=None)
    @given(st.randoms(use_true_random=False))
    def check(choose):
        found = answer(target, choose, tmp_path_factory.mktemp("damaged"))
        assert found.outcome not in (WRONG, RAW), found.detail

    check()


# Cases of the tool that once were answered wrongly; each has a test of its own beside its cause.
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (Images, 188),
        (Images, 2309),
        (Images, 7673),
        (Tables, 74),
        (Tables, 6356),
        (Listings, 559),
        (Checkpoints, 86),
        (Checkpoints, 780),
        (Checkpoints, 1221),
    ],
)
def test_cases_that_were_answered_wrongly(kind, case, tmp_path):
    found = run_case(kind(tmp_path), case, tmp_path / "scratch")
    assert found.outcome not in (WRONG, RAW), found.detail


def test_an_answer_is_judged(tmp_path):
    class Odd(Target):
        def check(self, choose, scratch):
            raise choose

    assert answer(Odd(tmp_path), KeyError("x"), tmp_path)[0] == RAW
    assert answer(Odd(tmp_path), ValueError("x\ny"), tmp_path)[0] == RAW


def test_the_tool_counts(tmp_path):
    out = tmp_path / "counts.json"
    command = [sys.executable, TOOL, "--only", "lists", "--cases", "6"]
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(out.read_text())
    assert counts["kinds"]["lists"]["cases"] == 6 and counts["faults"] == []


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import os; os._exit(3)", "died"),
        ("import time; time.sleep(600)", "hung"),
        ('print(\'{"outcome":"accepted","detail":"","seconds":1,"mib":9}\')', "above"),
        ('print(\'{"outcome":"wrong","detail":"","seconds":1,"mib":1}\')', "wrong"),
    ],
)
def test_faults_are_counted(program, outcome, tmp_path, monkeypatch, capfd):
    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fuzz", tool)
    spec.loader.exec_module(tool)
    worker = tmp_path / "worker.py"
    worker.write_text(f"input()\n{program}\ninput()", encoding="utf-8")
    monkeypatch.setattr(tool, "__file__", str(worker))
    shard = tool.Shard([("lists", 0)], 0.2 if outcome == "hung" else 250, 5)
    shard.run()
    assert shard.counts["lists"][outcome] == 1 and "lists case 0" in capfd.readouterr().err


def test_refusals_name_the_input(tmp_path):
    found = [run_case(Lists(tmp_path), case, tmp_path / "scratch") for case in range(12)]
    refused = [each.detail for each in found if each.outcome == REFUSED]
    assert refused and all("names.txt" in detail for detail in refused)
