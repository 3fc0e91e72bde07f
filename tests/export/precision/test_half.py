import numpy as np
import pytest
import timm
import torch
from torch import nn

import fastadapt as fa
from fastadapt.export.precision.half import (
    MixedPrecision,
    Trial,
    precision_units,
    reduce_precision,
    smallest_set,
)


def small_vit():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    backbone = timm.create_model("vit_tiny_patch16_224", **sizes)
    config = fa.AdaptConfig(rank=8, num_centers=3, input_size=(3, 32, 32))
    return fa.fold(fa.adapt(backbone, config, num_classes=4))


class Overflow(nn.Module):
    """The product of ``big`` leaves fp16's range, or, summed up, that of its residual stream."""

    def __init__(self, scale=1e6):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 16)
        self.big = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 5)
        self.big.weight.data *= scale

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(self.norm(x + self.big(x)))


X = torch.rand(16, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def run(module):
    with torch.no_grad():
        return module(X).numpy()


class TestUnits:
    def test_are_leaves_and_what_reads_its_parts(self):
        model = small_vit()
        units = precision_units(model, torch.rand(1, 3, 32, 32))
        assert units[0] == "backbone.patch_embed.proj"
        assert units[-1] == "head"
        assert "adapter.blocks.0.attn" in units
        assert not any(name.startswith("adapter.blocks.0.attn.") for name in units)
        assert "backbone.blocks.1.mlp.fc2" in units

    def test_an_attention_that_reads_its_projection_is_whole(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                return self.inner(x, x, x, need_weights=False)[0]

        assert precision_units(Model(), torch.rand(1, 3, 8)) == ["inner"]


class TestMixedPrecision:
    @pytest.mark.parametrize("dtype,limit", [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
    def test_fp32_in_and_out(self, dtype, limit):
        model, x = small_vit(), torch.rand(4, 3, 32, 32)
        half = MixedPrecision(model, dtype, precision_units(model, x))
        with torch.no_grad():
            want, got = model(x), half(x)
        assert got.dtype == torch.float32
        assert 0 < (got - want).abs().max() < limit * want.std()
        assert {p.dtype for p in half.parameters()} == {dtype}
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_kept_layers_have_their_fp32_weights(self):
        model, x = small_vit(), torch.rand(2, 3, 32, 32)
        units = precision_units(model, x)
        half = MixedPrecision(model, torch.float16, units, ["head", "adapter.norm2"])
        assert torch.equal(half.model.head.weight, model.head.weight)
        with torch.no_grad():
            every = MixedPrecision(model, torch.float16, units, units)(x)
            assert (every - model(x)).abs().max() < 1e-2


class TestRepair:
    def repaired(self, precision="fp16", model=None, **kwargs):
        model = model or Overflow()
        return model, reduce_precision(model, precision, Trial(run, run(model), (X[:1],)), **kwargs)

    def test_fp16_that_is_good_stays(self):
        _, result = self.repaired(model=Overflow(scale=1.0))
        assert (result.precision, result.fp32_layers, result.tried) == ("fp16", (), ())
        assert result.parity.passed

    def test_overflow_goes_to_bf16(self):
        lines = []
        _, result = self.repaired(tell=lines.append)
        assert (result.precision, result.fp32_layers) == ("bf16", ())
        assert "NaN or infinity" in result.tried[0]
        assert "trying bf16" in lines[0]

    def test_layers_that_need_fp32_are_found_and_named(self, monkeypatch):
        # bf16 is good enough for this model; where it is not, bisection follows.
        from fastadapt.export.parity import Thresholds
        from fastadapt.export.precision import half as precision

        limits = {**precision.THRESHOLDS, "bf16": Thresholds(error=1e-9)}
        monkeypatch.setattr(precision, "THRESHOLDS", limits)
        model, result = self.repaired()
        assert result.precision == "fp16"
        # The sum leaves fp16's range, too: the norm that takes it must be fp32.
        assert set(result.fp32_layers) == {"big", "norm"}
        assert result.parity.passed
        assert len(result.tried) == 2
        assert result.to_dict()["fp32_layers"] == list(result.fp32_layers)
        assert result.module.model.first.weight.dtype == torch.float16
        assert np.abs(run(result.module) - run(model)).max() < 0.05

    def test_what_fp32_does_not_pass_either_is_no_matter_of_precision(self):
        model = Overflow()
        with pytest.raises(fa.InputError, match="even with every layer in fp32"):
            reduce_precision(model, "bf16", Trial(run, run(model)[::-1].copy(), (X[:1],)))


@pytest.mark.parametrize("needed", [set(), {3}, {0, 9}, {4, 5, 6}, set(range(10))])
def test_smallest_set(needed):
    calls = []

    def passes(kept):
        calls.append(kept)
        return needed <= set(kept)

    assert smallest_set(range(10), passes) == sorted(needed)
    assert len(calls) <= 40
