"""The command that runs random calls in processes, at a small count."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[1] / "tools" / "random_calls.py"


def test_random_calls_are_counted(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, TOOL, "--cases", "3", "--shards", "2", "--only", "layer_norm"]
    out = tmp_path / "counts.json"
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts == json.loads(out.read_text())
    assert counts["operations"] == {"layer_norm": {"calls": 3, "wrong": 0, "died": 0, "hung": 0}}
    assert counts["failures"] == [] and counts["interpreter"] is not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print([])\nprint('[\"y: far off\"]', flush=True)\nprint([])", {"calls": 3, "wrong": 1}),
        ("import os\nprint([], flush=True)\nos._exit(9)", {"calls": 3, "died": 1}),
        (
            "import json, sys, time\n"
            "for i, _ in enumerate(json.loads(sys.argv[2])):\n"
            "    print([], flush=True) if i == 0 else time.sleep(600)",
            {"calls": 3, "hung": 1},
        ),
    ],
)
def test_what_is_wrong_dies_or_hangs_is_counted(program, expected, tmp_path, monkeypatch, capfd):
    """Processes that die or hang at their second call: another goes on with the third."""
    spec = importlib.util.spec_from_file_location("random_calls", TOOL)
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "random_calls", tool)
    spec.loader.exec_module(tool)
    worker = tmp_path / "worker.py"
    worker.write_text(program, encoding="utf-8")
    monkeypatch.setattr(tool, "__file__", str(worker))
    timeout = 15 if "hung" in expected else 250
    shard = tool.Shard([("layer_norm", case) for case in range(3)], {}, timeout)
    shard.run()
    assert shard.counts == {"layer_norm": Counter(expected)}
    assert len(shard.failures) == 1 and "case 1" in capfd.readouterr().err
