"""Benchmarks by name: what is run, refused, recorded and left out."""

import dataclasses

import pytest
import torch

from fastadapt import bench
from fastadapt.bench import harness, runner
from fastadapt.bench.protocol import METRICS, Benchmark, LeftOut, Record, Tables, center
from fastadapt.bench.reporting import plots
from fastadapt.bench.reporting import results as stored
from fastadapt.bench.suites import cladapter, cluster_attention, deployment
from fastadapt.errors import InputError
from tests.helpers.bench_results import environment_of, results_of


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Everything that runs on a CPU, once, and timed by as few calls as there can be."""
    out = tmp_path_factory.mktemp("bench") / "cpu.json"
    wall_times = harness.wall_times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "wall_times", lambda call, *_, **__: wall_times(call, 2, 0.0, 2))
        assert bench.run([], quick=True, json_out=out, plot=True) == 0
    return out


@pytest.fixture
def machine(monkeypatch):
    """An H100 in name, measured in no time."""
    monkeypatch.setattr(harness, "environment", lambda command: environment_of(command=command))


def replace(monkeypatch, module, run):
    benchmark = dataclasses.replace(module.BENCHMARK, run=run)
    monkeypatch.setattr(module, "BENCHMARK", benchmark)


def test_every_benchmark_is_declared():
    for name in runner.NAMES:
        benchmark = runner.load(name)
        assert isinstance(benchmark, Benchmark) and benchmark.title and benchmark.notes


def test_every_benchmark_runs_quickly_and_records_where_it_ran(quick):
    results = stored.read(quick)
    environment = results.environments[0]
    assert environment.date and environment.command and environment.commit
    assert isinstance(environment.copy_rate, float)
    assert isinstance(environment.product_rate, float)
    assert environment.versions["torch"]
    for name in ("quaternion_linear", "cladapter", "prompt_learner", "training", "gdpl"):
        result = results.benchmarks[name]
        assert not result.failed and not result.wrong
        assert result.records
        for record in result.records:
            assert record.errors and record.dimensions
            for part in record.parts.values():
                for metric in METRICS:
                    values = part.values(metric)
                    assert not values or metric == "wall_us" or torch.cuda.is_available()
                    assert all(isinstance(center(value), float) for value in values.values())
    markdown = quick.with_suffix(".md").read_text()
    assert "cladapter: forward, wall time" in markdown
    assert "training: cached" in markdown
    assert plots.paths(quick)["speedup"].exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_what_was_left_out_is_said(capsys, machine):
    assert bench.run(["deployment"]) == 0
    said = capsys.readouterr().err
    assert "deployment: left out, it needs a CUDA GPU" in said
    assert "GPU time, peak memory, Triton, torch.compile" in said


def test_a_wrong_result_or_a_failure_is_exit_code_one(machine, monkeypatch, tmp_path, capsys):
    good = results_of().benchmarks["cluster_attention"].records

    def stops(quick):
        yield good[0]
        raise RuntimeError("the GPU is gone")

    replace(monkeypatch, cluster_attention, stops)
    out = tmp_path / "out.json"
    assert bench.run(["cluster_attention"], json_out=out) == 1
    result = stored.read(out).benchmarks["cluster_attention"]
    assert result.records == good[:1], "what was measured before is kept"
    assert result.failed == "RuntimeError: the GPU is gone"

    wrong = Record("1", "n", 1, wrong={"y": {"ours": 1.0}})
    replace(monkeypatch, cluster_attention, lambda quick: iter([wrong]))
    assert bench.run(["cluster_attention"]) == 1
    assert "WRONG RESULTS" in capsys.readouterr().out


def test_results_are_written_after_every_shape(machine, monkeypatch, tmp_path):
    good = results_of().benchmarks["cluster_attention"].records
    path = tmp_path / "nvidia-h100-80gb-hbm3" / "results.json"
    seen = []

    def records(quick):
        for record in good:
            yield record
            seen.append(len(stored.read(path).benchmarks["cluster_attention"].records))

    replace(monkeypatch, cluster_attention, records)
    assert bench.run(["cluster_attention"], json_out=tmp_path) == 0
    assert seen == [1, 2]


def test_results_gather_in_one_file_each_with_its_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTADAPT_COMMIT", "0123abc")
    for module in (cladapter, cluster_attention):
        replace(monkeypatch, module, lambda quick: iter([Tables({})]))
    out = tmp_path / "results.json"
    assert bench.run(["cladapter"], json_out=out, command="first") == 0
    monkeypatch.setenv("FASTADAPT_COMMIT", "4567def")
    assert bench.run(["cluster_attention"], json_out=out, command="second") == 0
    found = {name: r.environment for name, r in stored.read(out).benchmarks.items()}
    assert (found["cladapter"].commit, found["cladapter"].command) == ("0123abc", "first")
    newer = found["cluster_attention"]
    assert (newer.commit, newer.command) == ("4567def", "second")


def test_what_is_left_out_does_not_replace_results(machine, monkeypatch, tmp_path):
    earlier = results_of()
    earlier.benchmarks["deployment"] = earlier.benchmarks.pop("cluster_attention")
    stored.write(tmp_path / "out.json", earlier)
    assert bench.run(["deployment"], json_out=tmp_path / "out.json") == 0
    assert stored.read(tmp_path / "out.json") == earlier


def test_quick_leaves_out_what_takes_minutes(machine, monkeypatch, capsys):
    monkeypatch.setattr(runner, "NAMES", ("deployment",))
    assert deployment.BENCHMARK.slow
    assert bench.run([], quick=True) == 0
    assert "deployment: left out, it takes minutes" in capsys.readouterr().err


def test_a_part_may_be_left_out(machine, monkeypatch, capsys):
    replace(monkeypatch, cluster_attention, lambda quick: iter([LeftOut("no such library")]))
    assert bench.run(["cluster_attention"]) == 0
    assert "cluster_attention: left out, no such library, 0 s" in capsys.readouterr().err


def test_a_module_with_tables_of_its_own(machine, monkeypatch, tmp_path, capsys):
    own = Tables({"speed": [{"batch": "8", "images/s": "100"}]}, notes=["How."])
    replace(monkeypatch, cluster_attention, lambda quick: iter([own]))
    out = tmp_path / "out.json"
    assert bench.run(["cluster_attention"], json_out=out) == 0
    assert "| 8 | 100 |" in capsys.readouterr().out
    assert "| 8 | 100 |" in out.with_suffix(".md").read_text()


def test_tables_are_written_as_they_grow(machine, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out.json"

    def written():
        result = stored.read(out).benchmarks["cluster_attention"]
        return result.tables, result.left_out

    def grow(quick):
        yield Tables({"speed": [{"batch": 1}]}, left_out=["b"], progress="a is done")
        assert written() == ({"speed": [{"batch": 1}]}, ["b"])
        yield Tables({"speed": [{"batch": 1}, {"batch": 8}]})

    replace(monkeypatch, cluster_attention, grow)
    assert bench.run(["cluster_attention"], json_out=out) == 0
    assert written() == ({"speed": [{"batch": 1}, {"batch": 8}]}, [])
    assert "cluster_attention: a is done, 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["warp"]}, "no benchmark is called 'warp'; there are cluster_attention"),
        ({"names": [], "plot": True}, "--plot needs --json"),
        ({"names": [], "compare": "0000000"}, "neither a file nor a machine or commit"),
        ({"names": [], "json_out": "results.txt"}, "ends in .json"),
    ],
)
def test_bad_input_is_told_before_anything_runs(machine, arguments, message):
    with pytest.raises(InputError, match=message):
        bench.run(**arguments)
