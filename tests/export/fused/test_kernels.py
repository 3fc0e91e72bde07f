"""A fused model's kernels, in Triton's interpreter and on a GPU, compute what its operations do."""

import pytest
import timm
import torch

import fastadapt as fa
from fastadapt.export.fused.convert import fuse
from fastadapt.fusion.kernel_choices import Choices
from tests.export.fused.test_convert import (
    deployed,
    error,
    images,
    in_fp64,
    in_half,
    make_convnext,
    make_vit,
)
from tests.helpers.kernel_checks import gpu, interpreted

WAYS = [Choices(), Choices("library", narrow=True, gelu="tanh")]


@interpreted
def test_interpreted_vit():
    model, x = deployed(make_vit(init_values=0.1)), images(2)
    truth = in_fp64(model, x)
    fused = fuse(model, torch.float32)
    for way in (Choices(), Choices(narrow=True)):
        fused.choices = way
        assert error(fused(x), truth) < 1e-6, way


@gpu
@pytest.mark.parametrize("make", [make_vit, make_convnext])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_models_are_as_exact_as_pytorch(make, dtype):
    model, x = deployed(make()).cuda(), images(5).cuda()
    truth = in_fp64(model, x)
    limit = 2 * error(in_half(model, x, dtype), truth)
    fused = fuse(model, dtype)
    for way in WAYS:
        fused.choices = way
        found = fused(x)
        assert error(found, truth) <= limit, way
        graphed = fa.GraphedCall(fused)
        assert torch.equal(graphed(x), found) and graphed.captured
        other = x.flip(0).contiguous()
        assert torch.equal(graphed(other), fused(other))


@gpu
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "convnext_base"])
def test_gpu_large_models_agree(name):
    from fastadapt.data.preprocess import Preprocess
    from fastadapt.export.graph_input import Deployed, GraphInput

    size = (3, 224, 224)
    backbone = timm.create_model(name, num_classes=0)
    model = fa.adapt(backbone, fa.AdaptConfig(input_size=size), num_classes=4).eval()
    model = Deployed(fa.fold(model), GraphInput(Preprocess(size))).cuda()
    x = torch.randint(0, 256, (9, 224, 224, 3), dtype=torch.uint8, device="cuda")
    truth = in_fp64(model, x)
    limit = 2 * error(in_half(model, x, torch.bfloat16), truth)
    fused = fuse(model, torch.bfloat16)
    for way in WAYS:
        fused.choices = way
        assert error(fused(x), truth) <= limit, way
