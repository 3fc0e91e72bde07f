"""Jobs in processes of their own: results in order, and one line for the first that fails."""

import pytest

from fastadapt.errors import InputError
from fastadapt.train.jobs import Job, run_jobs
from tests.helpers.jobs import work


def jobs(kinds, place):
    return [Job(f"job {i}", {"kind": kind, "place": place}) for i, kind in enumerate(kinds)]


def test_results_are_in_order_and_each_gpu_is_the_only_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen = []
    found = run_jobs(
        work, jobs("ab", tmp_path), ["cuda:1", "cpu"], lambda job, result: seen.append(job.name)
    )
    assert found == [("a", "cuda:0", "7"), ("b", "cpu", "4,7")]
    assert sorted(seen) == ["job 0", "job 1"]


def test_the_first_error_ends_the_others_which_save(tmp_path):
    saved = tmp_path / "state"
    with pytest.raises(InputError, match=r"^job 1: its process ended by signal 9"):
        run_jobs(work, jobs(["wait", "killed"], saved), ["cpu", "cpu"])
    with pytest.raises(InputError, match=r"^job 0: no images$"):
        run_jobs(work, jobs(["fail", "a"], saved), ["cpu"])
