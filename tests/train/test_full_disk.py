"""A disk that gets full in any phase of a run: one clear line, and nothing lost."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastadapt as fa
from fastadapt.train.run import TrainConfig, train
from tests.helpers.imagesets import make_folders

CONFIG = TrainConfig(epochs=1, batch_size=8, val_fraction=0.25, probe=False)
ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=0.5, input_size=(3, 32, 32))
FILES = ("state.safetensors", "metrics.jsonl", "adapter.safetensors", "curves.png", "results.json")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no names of open files")
def test_in_every_phase(tmp_path, monkeypatch):
    data = make_folders(tmp_path / "data", 6)

    def run(name, **options):
        out = tmp_path / name
        options = {"workers": 1, "save_every": 0, "pretrained": False} | options
        train(data, out, "test_efficientnet", CONFIG, ADAPT, **options)
        return load_file(out / "adapter.safetensors")

    whole = run("whole")
    sync = os.fsync
    for full in FILES:

        def fail(handle, full=full):
            if full in Path(f"/proc/self/fd/{handle}").readlink().name:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr("fastadapt.files.os.fsync", fail)
            with pytest.raises(fa.InputError, match=r"disk of .* is full: free some space") as told:
                run(full)
        resume = (tmp_path / full / "state.safetensors").is_file()
        assert ("with `resume=True`" in str(told.value)) == resume == (full not in FILES[:2])
        assert not list((tmp_path / full).glob(".*.tmp")), full
        resumed = run(full, resume=resume)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), full
        rows = (tmp_path / full / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["epoch"] for row in rows] == [1]
