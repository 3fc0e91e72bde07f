"""Tuned launch configurations: kept in a file, read once, never in the way."""

from __future__ import annotations

import json

import pytest
import torch

from fastadapt.bench import tune
from fastadapt.errors import InputError
from fastadapt.kernels.common import launcher, tuning

pytest.importorskip("triton")
from fastadapt.kernels.cluster_attention.block_sizes import block_sizes
from fastadapt.kernels.common.launcher import Device

SIZE = (25088, 196, 768, 256)
GPU = Device(0, 132, 232_448, 8)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where choices are kept in this test."""
    monkeypatch.setenv("FASTADAPT_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    caches = (tuning.read, block_sizes)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "tuning.json"
    for cache in caches:
        cache.cache_clear()


def tall(size=SIZE):
    rows, tokens, width, rank = size
    return block_sizes(rows, tokens, width, rank, GPU).project.all_rows


def test_a_choice_is_taken_for_its_size_alone(file):
    rule = tall()
    other = 64 if rule != 64 else 128
    key = tuning.key("cluster_attention", 0, SIZE)
    file.write_text(json.dumps({key: {"tall": other, "groups": 0}}))
    tuning.read.cache_clear()
    block_sizes.cache_clear()
    assert tall() == other
    assert tall((25088, 196, 1024, 256)) == rule


def test_a_choice_that_this_gpu_lacks_is_passed_over(file):
    rule = tall()
    key = tuning.key("cluster_attention", 0, SIZE)
    file.write_text(json.dumps({key: {"tall": 64, "groups": 3}}))  # groups are Hopper's
    tuning.read.cache_clear()
    block_sizes.cache_clear()
    assert tall() == rule


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_file_is_named_and_passed_over(file, text):
    rule = tall()
    file.write_text(text)
    tuning.read.cache_clear()
    block_sizes.cache_clear()
    with pytest.warns(UserWarning, match="tuning.json"):
        assert tall() == rule


def test_the_fastest_configuration_is_kept(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.harness, "input_sets", lambda moved: 1)
    monkeypatch.setattr(tune, "make_inputs", lambda *a: [torch.zeros(4, 196, 768)])
    monkeypatch.setattr(launcher, "device_of", lambda index: GPU)
    seen = []

    def step_time(inputs):
        seen.append(tall())
        return 1.0 if seen[-1] == 128 else 2.0

    monkeypatch.setattr(tune, "_step_time", step_time)
    tune.run([(128, 196, 768)])
    assert len(seen) == 3
    (choice,) = json.loads(file.read_text()).values()
    assert choice == {"tall": 128, "groups": 0}


@pytest.mark.parametrize("text", ["64x196", "ax1x1", "0x1x1"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="batch x tokens x channels"):
        tune.parse_size(text)


def test_no_gpu_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="CUDA GPU"):
        tune.run()
