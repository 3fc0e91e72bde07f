"""Benchmarks: what is timed, refused, recorded, compared, drawn; on a CPU and a fake GPU."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastadapt import bench
from fastadapt.bench import harness, operation
from fastadapt.bench.reporting import comparison, plots, readme
from fastadapt.bench.reporting import tables as report
from fastadapt.bench.suites import cluster_attention
from fastadapt.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Everything that runs on a CPU, once."""
    out = tmp_path_factory.mktemp("bench") / "cpu.json"
    assert bench.run([], quick=True, json_out=out, plot=True) == 0
    return out


def result_of(*, ours=50.0, compiled=80.0, spread=0.01, date="2026-01-01", commit="abc1234"):
    """A result file's content with one shape of one operation, as a GPU would give it."""

    def times(value):
        half = value * spread / 2
        return {"median": value, "low": value - half, "high": value + half}

    def part(factor):
        return {
            "flops": 1e10 * factor,
            "bytes": 1e7 * factor,
            "floor_us": 20.0 * factor,
            "target_us": [40.0 * factor, 30.0 * factor],
            "gpu_us": {"ours": times(ours * factor), "compiled": times(compiled * factor)},
            "peak_mib": {"ours": 10.0, "compiled": 20.0},
        }

    records = [
        {
            "shape": f"{size} × 2",
            "dimensions": "batch × tokens",
            "size": 2 * size,
            "errors": {},
            "failed": {"upstream": "out of memory"},
            "parts": {"forward": part(size), "backward": part(2 * size), operation.BOTH: part(3)},
        }
        for size in (1, 2)
    ]
    environment = {
        "date": date,
        "commit": commit,
        "gpu": "NVIDIA H100 80GB HBM3",
        "dtype": "bfloat16",
        "copy, TB/s": 3.0,
        "matrix product, TFLOP/s": 700.0,
        "versions": {"torch": "2"},
    }
    result = {"title": "Cluster attention", "notes": ["A note."], "records": records}
    return {"schema": 1, "environment": environment, "benchmarks": {"cluster_attention": result}}


def write(folder, name, results):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(results))
    return path


def test_every_benchmark_runs_quickly_and_records_where_it_ran(quick):
    results = json.loads(quick.read_text())
    environment = results["environment"]
    for key in ("date", "command", "commit", "copy, TB/s", "matrix product, TFLOP/s"):
        assert environment[key]
    assert environment["versions"]["torch"]
    for name in ("quaternion_linear", "cladapter", "prompt_learner", "training", "gdpl"):
        result = results["benchmarks"][name]
        assert "failed" not in result and "wrong" not in result
        for record in result["records"]:
            assert record["errors"] and record["dimensions"]
            for part in record["parts"].values():
                for metric, values in report.by_metric(part):
                    assert metric == "wall_us" or torch.cuda.is_available()
                    for value in map(report.center, values.values()):
                        assert value > 0
    markdown = quick.with_suffix(".md").read_text()
    assert "cladapter: forward, wall time" in markdown
    assert "training: cached" in markdown


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_what_was_left_out_is_said(capsys, monkeypatch):
    monkeypatch.setattr(harness, "environment", lambda command: result_of()["environment"])
    monkeypatch.setitem(bench.BENCHMARKS, "engine", False)
    assert bench.run(["engine"]) == 0
    said = capsys.readouterr().err
    assert "engine: left out, it needs a CUDA GPU" in said
    assert "GPU time, peak memory, Triton, torch.compile" in said


def test_ours_is_checked_against_fp64_before_it_is_timed():
    good = cluster_attention.case(2, 5, 16)
    record = operation.measure(good)
    assert set(record["parts"]["forward"]["wall_us"]) >= {"ours", "upstream"}
    assert record["errors"]["dtransforms"]["ours"] < 1e-2

    def off(*args):
        return good.providers["eager"].call(*args) * 1.001

    def breaks(*args):
        raise RuntimeError("no such\nkernel")

    providers = {**good.providers, "ours": operation.Provider(off)}
    record = operation.measure(_with(good, providers))
    assert "parts" not in record
    assert record["wrong"]["y"]["ours"] == pytest.approx(1e-3, rel=0.1)
    result = {"records": [record]}
    assert list(report.tables(result)) == [
        "WRONG RESULTS, not timed (errors against higher precision)"
    ]

    providers = {**good.providers, "upstream": operation.Provider(breaks)}
    record = operation.measure(_with(good, providers))
    assert record["failed"] == {"upstream": "RuntimeError: no such"}
    assert "upstream" not in record["parts"]["forward"]["wall_us"]


def _with(case, providers):
    return dataclasses.replace(case, providers=providers)


def test_nan_is_wrong():
    good = cluster_attention.case(2, 5, 16)

    def nan(*args):
        return good.providers["eager"].call(*args) * float("nan")

    record = operation.measure(_with(good, {**good.providers, "ours": operation.Provider(nan)}))
    assert "y" in record["wrong"] and "parts" not in record


def test_a_wrong_result_or_a_failure_is_exit_code_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "environment", lambda command: result_of()["environment"])
    good = result_of()["benchmarks"]["cluster_attention"]["records"]

    def stops(quick):
        yield good[0]
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(cluster_attention, "run", stops)
    out = tmp_path / "out.json"
    assert bench.run(["cluster_attention"], json_out=out) == 1
    result = json.loads(out.read_text())["benchmarks"]["cluster_attention"]
    assert result["records"] == good[:1], "what was measured before is kept"
    assert result["failed"] == "RuntimeError: the GPU is gone"

    wrong = {"shape": "1", "dimensions": "n", "size": 1, "wrong": {"y": {"ours": 1.0}}}
    monkeypatch.setattr(cluster_attention, "run", lambda quick: iter([wrong]))
    assert bench.run(["cluster_attention"]) == 1
    assert "WRONG RESULTS" in capsys.readouterr().out


def test_results_are_written_after_every_shape(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "environment", lambda command: result_of()["environment"])
    good = result_of()["benchmarks"]["cluster_attention"]["records"]
    seen = []

    def records(quick):
        for record in good:
            yield record
            (file,) = tmp_path.glob("*.json")
            seen.append(
                len(json.loads(file.read_text())["benchmarks"]["cluster_attention"]["records"])
            )

    monkeypatch.setattr(cluster_attention, "run", records)
    assert bench.run(["cluster_attention"], json_out=tmp_path) == 0
    assert seen == [1, 2]
    assert (tmp_path / "nvidia-h100-80gb-hbm3-abc1234.json").exists()


def test_results_of_one_commit_gather_in_one_file(monkeypatch, tmp_path):
    from fastadapt.bench.suites import cladapter, cluster_attention

    monkeypatch.setenv("FASTADAPT_COMMIT", "0123abc")
    for module in (cladapter, cluster_attention):
        monkeypatch.setattr(module, "run", lambda quick: {"tables": {}, "notes": []})
    out = tmp_path / "results.json"
    assert bench.run(["cladapter"], json_out=out, command="first") == 0
    assert bench.run(["cluster_attention"], json_out=out, command="second") == 0
    found = json.loads(out.read_text())
    assert set(found["benchmarks"]) == {"cladapter", "cluster_attention"}
    assert found["environment"]["command"] == "first; second"
    monkeypatch.setenv("FASTADAPT_COMMIT", "4567def")
    assert bench.run(["cluster_attention"], json_out=out, command="third") == 0
    found = json.loads(out.read_text())
    assert set(found["benchmarks"]) == {"cluster_attention"}
    assert found["environment"]["command"] == "third"


def test_quick_leaves_out_what_compiles_for_minutes(monkeypatch, capsys):
    monkeypatch.setattr(bench, "BENCHMARKS", {"deployment": True})
    assert bench.run([], quick=True) == 0
    assert "deployment: left out, it compiles for minutes" in capsys.readouterr().err


def test_a_module_with_tables_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "environment", lambda command: result_of()["environment"])
    own = {"tables": {"speed": [{"batch": "8", "images/s": "100"}]}, "notes": ["How."]}
    monkeypatch.setattr(cluster_attention, "run", lambda quick: own)
    out = tmp_path / "out.json"
    assert bench.run(["cluster_attention"], json_out=out) == 0
    assert "| 8 | 100 |" in capsys.readouterr().out
    assert "| 8 | 100 |" in out.with_suffix(".md").read_text()


def test_tables_are_written_as_they_grow(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "environment", lambda command: result_of()["environment"])
    out = tmp_path / "out.json"

    def written():
        return json.loads(out.read_text())["benchmarks"]["cluster_attention"]

    def grow(quick):
        yield {"tables": {"speed": [{"batch": 1}]}, "left_out": ["b"], "progress": "a is done"}
        assert written() == {"tables": {"speed": [{"batch": 1}]}, "left_out": ["b"]}
        yield {"tables": {"speed": [{"batch": 1}, {"batch": 8}]}}

    monkeypatch.setattr(cluster_attention, "run", grow)
    assert bench.run(["cluster_attention"], json_out=out) == 0
    assert written() == {"tables": {"speed": [{"batch": 1}, {"batch": 8}]}}
    assert "cluster_attention: a is done, 0 s" in capsys.readouterr().err


def test_a_part_joins_what_another_run_had_of_others():
    earlier = {
        "tables": {"a, speed": [{"n": 1}], "b, speed": [{"n": 2}]},
        "notes": ["How.", "a, x: failed"],
        "left_out": ["b, y: the run ended before it"],
        "readme": ["a, speed"],
    }
    part = {"about": ["b"], "tables": {"b, speed": [{"n": 3}]}, "notes": ["How."], "left_out": []}
    assert report.joined(earlier, part) == {
        "tables": {"a, speed": [{"n": 1}], "b, speed": [{"n": 3}]},
        "notes": ["How.", "a, x: failed"],
        "left_out": [],
        "readme": ["a, speed"],
        "wrong": [],
    }
    assert report.joined({}, part) == {k: v for k, v in part.items() if k != "about"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["warp"]}, "no benchmark is called 'warp'; there are cluster_attention"),
        ({"names": [], "plot": True}, "--plot needs --json"),
        ({"names": [], "compare": "0000000"}, "neither a file nor a commit"),
        ({"names": [], "json_out": "results.txt"}, "ends in .json"),
    ],
)
def test_bad_input_is_told_before_anything_runs(monkeypatch, arguments, message):
    monkeypatch.setattr(harness, "environment", lambda command: result_of()["environment"])
    with pytest.raises(InputError, match=message):
        bench.run(**arguments)


def test_spreads():
    found = harness.spread([float(i) for i in range(1, 12)])
    assert found == {"median": 6.0, "low": 2.0, "high": 10.0}
    assert harness.spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    whole = {"median": 10.0, "low": 9.0, "high": 12.0}
    part = {"median": 4.0, "low": 3.5, "high": 5.0}
    assert harness.difference(whole, part) == {"median": 6.0, "low": 4.0, "high": 8.5}


def test_wall_times_keep_to_their_budget():
    calls = []
    harness.wall_times(lambda: calls.append(1), repeats=7)
    assert len(calls) == 3 + 7
    calls.clear()
    harness.wall_times(lambda: calls.append(1), repeats=50, seconds=0.0, least=4)
    assert len(calls) == 3 + 4


class FakeGPU:
    """Counts calls; each takes 2 ms inside a graph."""

    def __init__(self):
        self.calls, self.captured, self.clock = [], 0, 0.0
        self.replays = 0

    def install(self, monkeypatch):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Stream:
            def wait_stream(self, other):
                pass

        class Graph:
            def replay(self):
                fake.replays += 1
                fake.clock += 2.0 * fake.captured

        @contextmanager
        def graph(_):
            before = len(fake.calls)
            yield
            fake.captured = len(fake.calls) - before

        @contextmanager
        def stream(_):
            yield

        for name, value in {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "stream": stream,
            "current_stream": Stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graph_times_are_per_call_over_all_inputs(monkeypatch):
    gpu = FakeGPU()
    gpu.install(monkeypatch)
    calls = [lambda i=i: gpu.calls.append(i) for i in range(3)]
    found = harness.graph_times(calls, repeats=4, replays=5)
    assert gpu.captured == 12
    assert gpu.calls[-12:] == [0, 1, 2] * 4
    assert gpu.replays == 3 + 5
    assert found["median"] == pytest.approx(2000.0)
    assert harness.graph_time(calls) == pytest.approx(2000.0)


def test_inputs_exceed_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert harness.input_sets(2**30) == 2
    assert harness.input_sets(50 * 2**20) == 4
    assert harness.input_sets(1000, most=32) == 32


def test_the_floor_is_the_larger_time(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda: {"flops": 1e12, "bytes": 1e9})
    assert harness.floor(1e12, 1e6) == pytest.approx(1e6)
    assert harness.floor(1e6, 1e9) == pytest.approx(1e6)


def test_a_step_that_does_not_fit_is_said(monkeypatch):
    from fastadapt.bench import network_step as steps

    def full():
        raise torch.OutOfMemoryError("no memory")

    part = steps.part({"upstream": steps.measure(full), "ours": steps.measure(lambda: None)})
    assert part["failed"] == {"upstream": "out of memory"}
    assert set(part["wall_us"]) == {"ours"}
    record = {"shape": "1", "dimensions": "n", "size": 1, "parts": {"step": part}}
    found = report.tables({"records": [record]})
    assert found["providers that failed"][0]["provider"] == "upstream, step"


def test_tables_name_baseline_floor_target_and_failures():
    result = result_of()["benchmarks"]["cluster_attention"]
    found = report.tables(result)
    row = found["forward, GPU time in µs"][0]
    assert row == {
        "batch × tokens": "1 × 2",
        "ours": "50.0 ± 0.2",
        "compiled": "80.0 ± 0.4",
        "ours over best baseline": "1.60× (compiled)",
        "floor": "20.0",
        "of floor": "40 %",
        "target (H100)": "40.0 / 30.0",
        "met": "no",
    }
    assert found["providers that failed"][0]["why"] == "out of memory"
    summary = report.summary(result)[0]
    assert summary["forward, µs: ours / compiled"] == "50.0 / 80.0 (1.60×)"
    assert summary[f"{operation.BOTH}, MiB: ours / compiled"] == "10 / 20"


def test_targets_are_met_by_time_or_by_speedup():
    result = result_of(ours=35.0)["benchmarks"]["cluster_attention"]
    result["records"][0]["parts"]["backward"].pop("target_us")
    result["records"][0]["parts"]["backward"]["target_speedup"] = [3, "compiled"]
    found = report.tables(result)
    assert found["forward, GPU time in µs"][0]["met"] == "first"
    assert found["backward, GPU time in µs"][0]["target (H100)"] == "3× compiled"
    assert found["backward, GPU time in µs"][0]["met"] == "no"


def test_only_changes_beyond_noise_count():
    before = result_of()
    same = comparison.changes(before, result_of(ours=50.9))
    assert not any(c.real for c in same) and not comparison.worse(same, 0.0)

    slower = comparison.changes(before, result_of(ours=60.0))
    assert comparison.worse(slower, 5.0) and not comparison.worse(slower, 25.0)
    text = comparison.as_text(slower, 5.0)
    assert "+20.0 %  ours: cluster_attention · 1 × 2 · forward · gpu_us, 50 → 60" in text
    noisy = comparison.changes(before, result_of(ours=60.0, spread=0.3))
    assert not comparison.worse(noisy, 5.0)

    drift = comparison.changes(before, result_of(compiled=100.0))
    assert not comparison.worse(drift, 5.0), "a baseline that got slower is no failure"
    assert not comparison.worse(comparison.changes(before, result_of(ours=40.0)), 5.0)


def test_results_are_found_by_file_and_commit(tmp_path):
    old = write(tmp_path, "a.json", result_of(commit="aaa1111", date="2026-01-01"))
    write(tmp_path, "b.json", result_of(commit="aaa1111", date="2026-02-01", ours=33.0))
    write(tmp_path, "demo.json", {"other": "file"})
    assert comparison.load(str(old))["environment"]["date"] == "2026-01-01"
    assert comparison.load("aaa", tmp_path)["environment"]["date"] == "2026-02-01"
    with pytest.raises(InputError, match="there are aaa1111"):
        comparison.load("bbb", tmp_path)
    with pytest.raises(InputError, match="nothing to compare"):
        comparison.load(str(write(tmp_path / "c", "c.json", {"environment": {}, "benchmarks": {}})))


def test_a_slowdown_is_exit_code_one(tmp_path, capsys):
    old = write(tmp_path, "old.json", result_of())
    new = write(tmp_path, "new.json", result_of(ours=60.0))

    assert comparison.main([str(old), str(new)]) == 1
    assert comparison.main([str(old), str(new), "--threshold", "30"]) == 0
    assert comparison.main([str(new), str(old)]) == 0
    assert comparison.main([str(old), "nothing"]) == 1
    assert "fastadapt: nothing is neither" in capsys.readouterr().err


def test_the_newest_results_of_a_machine_reach_the_readme(tmp_path):
    results = tmp_path / "bench" / "results"
    write(results, "old.json", result_of(ours=70.0, date="2026-01-01"))
    newest = write(results, "new.json", result_of(ours=50.0, date="2026-03-01"))
    other = result_of(ours=10.0, date="2026-04-01")
    other["environment"]["gpu"] = "NVIDIA H200"
    write(results, "h200.json", other)
    text = (
        "# T\n<!-- bench: all H100 -->\nstale\n<!-- /bench -->\n"
        "<!-- bench: plots H100 -->\n<!-- /bench -->\n<!-- bench: gdpl H100 -->\n<!-- /bench -->\n"
    )
    made = readme.render(text, tmp_path)
    assert "stale" not in made
    assert "| 1 × 2 | 50.0 / 80.0 (1.60×) |" in made
    assert "(bench/results/new.md)" in made
    assert made.count("Not measured on an H100 yet.") == 2
    assert readme.render(made, tmp_path) == made
    plots.write_plots(newest, json.loads(newest.read_text()))
    made = readme.render(made, tmp_path)
    assert "![Roofline](bench/results/new-roofline.png)" in made
    assert tmp_path / "bench/results/nvidia-h200-roofline.png" in readme.draw(tmp_path)
    made = readme.render(made, tmp_path)
    assert "![Roofline](bench/results/nvidia-h100-80gb-hbm3-roofline.png)" in made
    with pytest.raises(InputError, match="'warp', which is no benchmark"):
        readme.render("<!-- bench: warp H100 -->\n<!-- /bench -->", tmp_path)


def test_pictures_show_the_newest_of_every_benchmark():
    old, new = result_of(), result_of()
    old["environment"]["commit"] = "0000000"
    old["benchmarks"]["cladapter"] = old["benchmarks"]["cluster_attention"]
    gathered = readme._gathered([new, old])
    titles = {axes.get_title() for axes in plots.speedups(gathered).axes}
    assert {"cluster_attention", "cladapter (0000000)"} <= titles
    assert gathered["environment"] == new["environment"]


def test_pictures(tmp_path, quick):
    path = tmp_path / "r.json"
    written = plots.write_plots(path, result_of())
    assert written == plots.paths(path)
    for picture in written:
        assert picture.read_bytes().startswith(b"\x89PNG")
    speedups = plots.speedups(result_of())
    titles = [axes.get_title() for axes in speedups.axes]
    assert "cluster_attention" in titles
    assert plots.write_plots(path, {**result_of(), "benchmarks": {}}) == []
    assert plots.paths(quick)[0].exists()


def test_pytest_benchmark_has_every_operation():
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-p", "no:xdist"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "-p", "no:cacheprovider"]
    # A worker of xdist's would switch benchmarks off.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("cluster_attention", "quaternion_linear", "cladapter", "prompt_learner"):
        assert f"test_{name}[" in done.stdout


def test_a_backward_is_the_difference_of_graph_times(monkeypatch):
    took = iter([10.0, 30.0, 11.0, 40.0])  # forward, then both directions, of each provider

    def graph_times(calls, repeats):
        assert len(calls) == 2 and repeats >= 1
        for call in calls:
            call()
        return harness.spread([next(took)])

    monkeypatch.setattr(harness, "graph_times", graph_times)
    monkeypatch.setattr(harness, "peak_memory", lambda call: 3.0)
    case = cluster_attention.case(2, 5, 16)
    providers = {name: case.providers[name] for name in ("ours", "eager", "upstream")}
    parts = operation.measure(_with(case, providers))["parts"]
    assert parts["backward"]["gpu_us"]["ours"]["median"] == 20.0
    assert parts["backward"]["gpu_us"]["upstream"]["median"] == 29.0
    assert parts[operation.BOTH]["peak_mib"] == {"ours": 3.0, "upstream": 3.0}


def test_a_process_that_a_benchmark_starts_runs_no_benchmarks():
    """Spawned processes import the main module again, under this name."""
    runpy.run_module("fastadapt.bench.__main__", run_name="__mp_main__")


@pytest.mark.gpu
def test_a_gpu_gives_graph_times_and_memory():
    case = cluster_attention.case(8, 49, 256)
    eager = case.providers["eager"]
    record = operation.measure(_with(case, {"ours": eager, "eager": eager}))
    forward = record["parts"]["forward"]
    assert 0 < forward["gpu_us"]["ours"]["median"] < forward["wall_us"]["ours"]["median"]
    assert forward["peak_mib"]["ours"] > 0
    assert record["parts"]["backward"]["gpu_us"]["ours"]["median"] > 0
