"""Fused models in FP8."""

from dataclasses import replace

import pytest
import torch

import fastadapt as fa
from fastadapt.export.backends.fastadapt import build_fused, calibrate_float8, load_fused
from fastadapt.export.fused.convert import fuse
from fastadapt.export.fused.float8 import (
    convertible,
    hidden_ranges,
    layers_in_float8,
    ranked_steps,
    to_float8,
)
from fastadapt.fusion.kernel_choices import Choices
from fastadapt.kernels.common.e4m3 import E4M3
from tests.export.fused.test_convert import (
    deployed,
    error,
    images,
    in_fp64,
    in_half,
    make_convnext,
    make_vit,
)
from tests.export.fused.test_model import described
from tests.helpers.kernel_checks import gpu

BF16 = torch.bfloat16


def wide_convnext():
    return make_convnext(depths=(1, 1, 2, 1), dims=(16, 24, 144, 160))


@pytest.mark.parametrize(
    ("make", "steps"),
    [(make_vit, [1, 2]), (lambda: make_vit(embed_dim=40), []), (wide_convnext, [5, 6, 8])],
)
def test_linear_layers_are_in_e4m3(make, steps):
    model, x = deployed(make()), images(5)
    truth, exact = in_fp64(model, x), fuse(model, BF16)
    assert convertible(exact) == steps
    ranges = hidden_ranges(exact, [x[:2], x[2:]])
    assert list(ranges) == steps and all(0 < r < 100 for r in ranges.values())
    fused = to_float8(exact, ranges)
    found = [i for i, s in enumerate(fused.steps) if getattr(s, "fc1_weight", x).dtype == E4M3]
    assert found == steps
    names = layers_in_float8(fused, ranges)
    assert {name.split(".")[0] for name in names} == {str(i) for i in steps}
    assert error(fused(x), truth) < 0.05
    if steps:
        assert not torch.equal(fused(x), exact(x))
        kept = to_float8(exact, ranges, keep=steps)
        assert torch.equal(kept(x), exact(x)) and not layers_in_float8(kept, ranges)


def test_values_beyond_the_range_are_cut_off():
    model, x = fuse(deployed(make_vit()), BF16), images(5)
    ranges = hidden_ranges(model, [x])
    narrow = {index: value / 20 for index, value in ranges.items()}
    assert error(to_float8(model, narrow)(x), model(x).double()) > 3 * error(
        to_float8(model, ranges)(x), model(x).double()
    )


def test_a_file_in_fp8_computes_what_was_saved(tmp_path):
    model, x, path = deployed(make_vit()), images(5), tmp_path / "model.fp8.safetensors"
    float8 = calibrate_float8(model, [x], "cpu")
    details = build_fused(model, path, precision="fp8", float8=replace(float8, keep=[2]))
    assert details["precision"] == "fp8"
    assert list(details["fp8_layers"]) == ["1.qkv", "1.fc1", "1.fc2"]
    loaded, name = load_fused(path, described(path), "cpu")
    assert name == "fastadapt (plain PyTorch), CPU"
    expected = to_float8(fuse(model, BF16), float8.ranges, keep=[2])
    assert torch.equal(loaded(x), expected(x))


@gpu
@pytest.mark.parametrize("make", [make_vit, wide_convnext])
def test_gpu_models_in_fp8_agree(make):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no products in e4m3")
    model, x = deployed(make()).cuda(), images(5).cuda()
    truth = in_fp64(model, x)
    exact = fuse(model, BF16)
    fused = to_float8(exact, hidden_ranges(exact, [x]))
    on_cpu = error(fused.to("cpu")(x.cpu()), truth.cpu())
    assert on_cpu < 0.05
    # Of few layers in e4m3 the error is that of bf16, which differs from device to device.
    limit = 1.5 * max(on_cpu, error(in_half(model, x, BF16), truth))
    for way in (Choices(), Choices("library", gelu="tanh")):
        fused.choices = way
        found = fused(x)
        assert error(found, truth) <= limit
        graphed = fa.GraphedCall(fused)
        assert torch.equal(graphed(x), found) and graphed.captured


def test_steps_are_ranked_by_what_they_lose():
    model, x = fuse(deployed(make_vit(depth=3)), BF16), images(5)
    ranges = hidden_ranges(model, [x])
    ranges[2] /= 50  # which cuts off most of what it has
    assert ranked_steps(model, ranges, x)[0] == 2
    assert sorted(ranked_steps(model, ranges, x)) == [1, 2, 3]
