"""A few kills, as ``tools/kill.py`` makes hundreds, and what it takes for a fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kill_operations import leftovers, readable

TOOL = Path(__file__).parents[1] / "tools" / "kill.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_training_loses_nothing(tmp_path):
    pytest.importorskip("open_clip")
    out = tmp_path / "counts.json"
    command = [sys.executable, TOOL, "--only", "train", "--kills", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counts = json.loads(out.read_text())
    assert (counts["kills"], counts["wrong"], counts["faults"]) == (2, 0, [])
    assert counts["commands"] == {
        "train": {"kills": 2, "at a point": 1, "at a time": 1, "wrong": 0}
    }


def test_halves_and_leftovers_are_found(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert readable(tmp_path) == leftovers(tmp_path) == ""
    (tmp_path / "run" / ".results.json.abc.tmp").write_text("{")
    assert readable(tmp_path) == "" and leftovers(tmp_path) == "left run/.results.json.abc.tmp"
    (tmp_path / "run" / "results.json").write_text('{"accuracy": 0.')
    assert readable(tmp_path).startswith("results.json is there by halves")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "adapter.safetensors").write_bytes(b"\x09")
    assert readable(tmp_path).startswith("adapter.safetensors is there by halves")
