"""Two results side by side."""

import pytest

from fastadapt.bench.protocol import Results
from fastadapt.bench.reporting import comparison
from fastadapt.errors import InputError
from tests.helpers.bench_results import results_of, write


def test_only_changes_beyond_noise_count():
    before = results_of()
    same = comparison.changes(before, results_of(ours=50.9))
    assert not any(c.real for c in same) and not comparison.worse(same, 0.0)

    slower = comparison.changes(before, results_of(ours=60.0))
    assert comparison.worse(slower, 5.0) and not comparison.worse(slower, 25.0)
    text = comparison.as_text(slower, 5.0)
    assert "+20.0 %  ours: cluster_attention · 1 × 2 · forward · gpu_us, 50 → 60" in text
    noisy = comparison.changes(before, results_of(ours=60.0, width=0.3))
    assert not comparison.worse(noisy, 5.0)

    drift = comparison.changes(before, results_of(compiled=100.0))
    assert not comparison.worse(drift, 5.0), "a baseline that got slower is no failure"
    assert not comparison.worse(comparison.changes(before, results_of(ours=40.0)), 5.0)


def test_results_are_found_by_file_and_commit(tmp_path):
    old = write(tmp_path / "h100/results.json", results_of(commit="aaa1111", date="2026-01-01"))
    newer = results_of(commit="aaa1111", date="2026-02-01", ours=33.0, gpu="NVIDIA H200")
    newer.benchmarks["cladapter"] = results_of(commit="ccc").benchmarks["cluster_attention"]
    write(tmp_path / "h200/results.json", newer)
    (tmp_path / "demo.json").write_text('{"other": "file"}')
    assert comparison.load(str(old)).environments[0].date == "2026-01-01"
    assert set(comparison.load("h200", tmp_path).benchmarks) == {"cluster_attention", "cladapter"}
    of_commit = comparison.load("aaa", tmp_path)
    assert of_commit.gpu == "NVIDIA H200"
    assert set(of_commit.benchmarks) == {"cluster_attention"}
    with pytest.raises(InputError, match="there are aaa1111, ccc"):
        comparison.load("bbb", tmp_path)
    with pytest.raises(InputError, match="nothing to compare"):
        comparison.load(str(write(tmp_path / "c.json", Results(None))))
    with pytest.raises(InputError, match="holds no results of fastadapt bench"):
        comparison.load(str(tmp_path / "demo.json"))


def test_a_slowdown_is_exit_code_one(tmp_path, capsys):
    old = write(tmp_path / "old.json", results_of())
    new = write(tmp_path / "new.json", results_of(ours=60.0))

    assert comparison.main([str(old), str(new)]) == 1
    assert comparison.main([str(old), str(new), "--threshold", "30"]) == 0
    assert comparison.main([str(new), str(old)]) == 0
    assert comparison.main([str(old), "nothing"]) == 1
    assert "fastadapt: nothing is neither" in capsys.readouterr().err
