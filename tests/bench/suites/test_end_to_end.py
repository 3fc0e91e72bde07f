"""Whole jobs: commands in processes of their own, cut into phases."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from fastadapt.bench.protocol import Result, Results
from fastadapt.bench.reporting import plots
from fastadapt.bench.suites import end_to_end
from fastadapt.bench.suites.end_to_end import COLD, WARM, Command, CommandError
from tests.helpers import warm_process
from tests.helpers.bench_results import environment_of


@pytest.fixture
def warm(monkeypatch):
    """Commands are forks of a process that has all imported, instead of importing it themselves."""

    def run(arguments, **options):
        start = subprocess.run if options.get("capture_output") else warm_process.run
        return start(arguments, **options)

    replaced = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(end_to_end, "subprocess", replaced)
    monkeypatch.setattr(end_to_end, "BASELINES_IMPORT", ())


def test_every_command_runs_and_tells_its_phases(warm):
    *_, last = end_to_end.run(quick=True)
    assert last.left_out == [] and len(last.notes) == 2, last.notes
    found = [(line.job, line.provider, line.start) for line in last.timelines]
    assert found == [
        ("two stages", "ours", COLD),
        ("two stages", "plain", WARM),
        ("two stages", "plain, cached by hand", WARM),
        ("two stages", "ours", WARM),
        ("GDPL", "ours", COLD),
        ("GDPL", "upstream's loop", WARM),
        ("GDPL", "ours", WARM),
    ]
    for line in last.timelines:
        assert sum(line.seconds.values()) == pytest.approx(line.total, rel=0.02)
        assert set(line.seconds) <= {*end_to_end.PHASES.values(), end_to_end.OTHER}
        assert 0 <= line.accuracy <= 1
        assert line.seconds["stage 1"] > 0
        assert ("stage 2" in line.seconds) == (line.job == "two stages")
    cached = last.timelines[2].seconds
    assert cached["features"] > 0 and cached["decode"] > 0 and cached["start"] > 0
    stages, gdpl = last.tables.values()
    assert [row["command"] for row in stages] == [line.provider for line in last.timelines[:4]]
    assert stages[1]["times as fast as plain"] == "1.00×"
    assert gdpl[1]["times as fast as upstream's loop"] == "1.00×"
    results = Results(None, {"end_to_end": Result(environment_of(), timelines=last.timelines)})
    titles = [axes.get_title() for axes in plots.phases(results).axes]
    assert titles == ["two stages", "GDPL"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """No data, no model and no imports: commands are what a test makes them."""
    monkeypatch.setattr(end_to_end, "BASELINES_IMPORT", ())
    for name in ("write_data", "write_backbone", "write_clip"):
        monkeypatch.setattr(end_to_end.job_files, name, lambda *_: (None, "no data"))

    def use(*commands):
        monkeypatch.setattr(end_to_end, "commands", lambda size, folder: list(commands))

    return use


WRITES = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[-1])
out.mkdir()
(out / "profile.json").write_text(json.dumps({"start": 0.5, "stage1": 0, "accuracy": 0.75}))
"""
FAILS = "import sys; print('reading'); sys.exit('no such GPU')"


def test_a_baseline_that_fails_leaves_the_others(small):
    small(
        Command("job", "plain", WARM, ("-c", FAILS)), Command("job", "ours", WARM, ("-c", WRITES))
    )
    (last,) = end_to_end.run(quick=True)
    assert "job, plain: exit code 1: no such GPU" in last.notes
    ((row,),) = last.tables.values()
    assert (row["command"], row["test accuracy"]) == ("ours", "75.0%")
    assert "times as fast as plain" not in row


def test_what_baselines_import_is_compiled_before(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "BASELINES_IMPORT", ("wave, no_such_module", "colorsys"))
    end_to_end.compile_imports(tmp_path)
    names = {path.name.partition(".")[0] for path in tmp_path.rglob("*.pyc")}
    assert {"wave", "colorsys"} <= names


def test_ours_may_not_fail(small):
    small(Command("job", "ours", COLD, ("-c", FAILS)))
    with pytest.raises(CommandError, match="exit code 1: no such GPU"):
        list(end_to_end.run(quick=True))


def test_a_command_that_takes_too_long_is_ended(small, monkeypatch, tmp_path):
    monkeypatch.setattr(end_to_end, "TIMEOUT", 0.5)
    command = Command("job", "plain", WARM, ("-c", "import time; time.sleep(60)"))
    with pytest.raises(CommandError, match=r"not done after 0\.5 s"):
        end_to_end.execute(command, tmp_path / "out", tmp_path)


def test_phases_come_from_the_profile_or_the_metrics(tmp_path):
    rows = [{"stage": 1, "seconds": 1.0}, {"stage": 1, "seconds": 2.0}, {"stage": 2, "seconds": 4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert end_to_end.phases(tmp_path) == {"stage 1": 3.0, "stage 2": 4}
    profile = {"start": 1.0, "decode": 2.0, "saving": 0.0, "total": 3.0}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    assert end_to_end.phases(tmp_path) == {"start": 1.0, "decode": 2.0}


def test_accuracy_is_that_of_the_test_split(tmp_path):
    assert end_to_end.accuracy(tmp_path) is None
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"val": {"accuracy": 0.1}, "test": {"accuracy": 0.5}}))
    assert end_to_end.accuracy(tmp_path) == 0.5
    results.write_text(json.dumps({"metrics": {"all": {"accuracy": 0.25}}}))
    assert end_to_end.accuracy(tmp_path) == 0.25
