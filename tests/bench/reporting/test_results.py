"""Result files: where they are, what is kept, merged and read."""

import json
from pathlib import Path

import pytest

from fastadapt.bench.protocol import Result, Results, Tables, Timeline
from fastadapt.bench.reporting import results as stored
from fastadapt.errors import InputError
from tests.helpers.bench_results import H100, environment_of, results_of, write

ROOT = Path(__file__).parents[3]


def test_a_file_holds_all_that_was_measured(tmp_path):
    results = results_of()
    results.benchmarks["own"] = Result(
        environment_of(commit="f00"),
        tables={"speed": [{"n": 1}]},
        summary=["speed"],
        timelines=[Timeline("job", "ours", "warm", {"start": 1.0}, 2.0)],
        left_out=["b"],
    )
    path = tmp_path / "results.json"
    stored.write(path, results)
    assert stored.read(path) == results
    stored.write_markdown(path, results)
    text = path.with_suffix(".md").read_text()
    assert "- commit abc1234, 2026-01-01: `bench`" in text
    assert "- commit f00, 2026-01-01: `bench`" in text
    assert "### cluster_attention: forward, GPU time in µs" in text


def test_files_of_the_first_schema_are_read(tmp_path):
    results = results_of()
    result = results.benchmarks["cluster_attention"]
    data = results.to_json()
    environment = data["benchmarks"]["cluster_attention"].pop("environment")
    environment |= environment.pop("machine")
    first = {"schema": 1, "environment": environment, "benchmarks": data["benchmarks"]}
    (tmp_path / "old.json").write_text(json.dumps(first))
    assert stored.read(tmp_path / "old.json").benchmarks == {"cluster_attention": result}


def test_every_machine_has_one_current_file():
    current = stored.current(ROOT / "bench" / "results")
    assert current
    for path, results in current.items():
        assert path.parent.name == stored.machine_folder(results.gpu)
        for result in results.benchmarks.values():
            assert result.environment.commit and result.environment.gpu == results.gpu


def test_the_file_is_named_or_in_the_machines_folder(tmp_path):
    assert stored.result_path(tmp_path / "a.json", H100) == tmp_path / "a.json"
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    assert stored.result_path(tmp_path, H100) == folder / "results.json"
    assert stored.result_path(tmp_path, None) == tmp_path / "cpu" / "results.json"
    with pytest.raises(InputError, match=r"ends in \.json"):
        stored.result_path(tmp_path / "a.txt", None)


def test_results_of_another_machine_are_not_kept(tmp_path):
    path = write(tmp_path / "r.json", results_of())
    assert stored.read_earlier(path, H100) == results_of()
    assert stored.read_earlier(path, None) == Results(None)
    path.write_text("not JSON")
    assert stored.read_earlier(path, H100) == Results(H100)


def test_a_part_joins_what_another_run_had_of_others():
    earlier = Result(
        environment_of(command="first"),
        tables={"a, speed": [{"n": 1}], "b, speed": [{"n": 2}]},
        notes=["How.", "a, x: failed"],
        left_out=["b, y: the run ended before it"],
        summary=["a, speed"],
    )
    part = Tables(
        {"b, speed": [{"n": 3}]}, notes=["How."], summary=["b, speed"], about=("b",), progress="b"
    )
    now = Result(environment_of(command="second"))
    joined = stored.join_parts(now, part, earlier)
    assert joined.tables == {"a, speed": [{"n": 1}], "b, speed": [{"n": 3}]}
    assert joined.notes == ["How.", "a, x: failed"]
    assert joined.summary == ["a, speed", "b, speed"]
    assert joined.left_out == [] and joined.wrong == []
    assert joined.environment.command == "first; second"
    for other in (environment_of(commit="0000000"), environment_of(commit="abc1234-dirty"), None):
        alone = stored.join_parts(Result(other), part, earlier)
        assert alone.tables == part.tables
    assert stored.join_parts(now, part, Result()).tables == part.tables
