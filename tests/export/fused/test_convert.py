"""Fused models compute what the folded ones do."""

import copy

import pytest
import timm
import torch
from torch import nn

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.export.fused.convert import fuse
from fastadapt.export.graph_input import Deployed, GraphInput
from fastadapt.fusion.kernel_choices import Choices

SIZE = (3, 32, 32)


def shaken(model):
    """No bias is zero, and no scale one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def make_vit(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return timm.models.VisionTransformer(**(sizes | options), num_classes=0)


def make_convnext(**options):
    sizes = {"depths": (1, 2, 2, 1), "dims": (16, 24, 32, 40)}
    return timm.models.ConvNeXt(**(sizes | options), num_classes=0)


def deployed(backbone, graph_input=None, **config):
    torch.manual_seed(0)
    config = fa.AdaptConfig(rank=8, num_centers=3, input_size=SIZE, **config)
    model = shaken(fa.adapt(shaken(backbone), config, num_classes=4)).eval()
    return Deployed(fa.fold(model), graph_input or GraphInput(Preprocess(SIZE)))


def images(count=3):
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)


@torch.no_grad()
def in_fp64(model, x):
    model = copy.deepcopy(model).double()
    return model.model((x.double().movedim(-1, 1) / 255 - model.mean) / model.std)


@torch.no_grad()
def in_half(model, x, dtype):
    y = (x.float().movedim(-1, 1) / 255 - model.mean) / model.std
    return copy.deepcopy(model.model).to(dtype)(y.to(dtype))


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


MODELS = {
    "vit": lambda: deployed(make_vit()),
    "vit, layer scale": lambda: deployed(make_vit(init_values=0.1)),
    "vit, registers": lambda: deployed(make_vit(reg_tokens=2, no_embed_class=True)),
    "vit, class token": lambda: deployed(make_vit(), pool="token", adapter="none"),
    "vit, any size": lambda: deployed(make_vit(dynamic_img_size=True, img_size=40)),
    "vit, two blocks": lambda: deployed(make_vit(), depth=2),
    "vit, no adapter": lambda: deployed(make_vit(), adapter="none"),
    "convnext": lambda: deployed(make_convnext()),
    "convnext, no layer scale": lambda: deployed(make_convnext(ls_init_value=None)),
    "convnext, token mode": lambda: deployed(make_convnext(), mode="token"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_way_computes_the_same(name):
    model, x = MODELS[name](), images()
    truth = in_fp64(model, x)
    half = error(in_half(model, x, torch.bfloat16), truth)
    ways = [Choices(), Choices("library", narrow=True)]
    rounds = Choices(narrow=True, gelu="tanh")  # by less than half precision
    for dtype, limit, more in ((torch.float32, 3e-6, []), (torch.bfloat16, 2 * half, [rounds])):
        fused = fuse(model, dtype)
        for way in ways + more:
            fused.choices = way
            found = fused(x)
            assert found.dtype == torch.float32 and error(found, truth) < limit, way
            assert torch.equal(fused(x), found)  # constants are kept, and nothing adds up


def test_batches_of_one_and_other_sizes():
    model = deployed(make_vit())
    fused, x = fuse(model, torch.float32), images()
    assert error(fused(x[1:2]), in_fp64(model, x)[1:2]) < 3e-6
    with pytest.raises(InputError, match=r"expected uint8 \[batch, 32, 32, 3\]"):
        fused(x[:, :16])
    with pytest.raises(InputError, match="expected uint8"):
        fused(x.float())


def with_changed(change):
    model = deployed(make_vit())
    change(model.model)
    return model


REFUSED = {
    "is a Linear": lambda: Deployed(nn.Linear(3, 3), GraphInput(Preprocess(SIZE))),
    "input is not uint8": lambda: deployed(make_vit(), GraphInput(Preprocess(SIZE), "float")),
    "several views": lambda: deployed(make_vit(), tta="flips"),
    "expected timm's VisionTransformer": lambda: deployed(
        timm.create_model("test_efficientnet", num_classes=0)
    ),
    "norm_pre is a LayerNorm": lambda: deployed(make_vit(pre_norm=True)),
    "approximates GELU": lambda: with_changed(
        lambda m: m.backbone.blocks[1].mlp.set_submodule("act", nn.GELU("tanh").eval())
    ),
    "q_norm is a": lambda: deployed(make_vit(qk_norm=True)),
    "its stem is": lambda: deployed(make_convnext(stem_type="overlap")),
    "the filter is 5": lambda: deployed(make_convnext(kernel_sizes=5)),
    "mlp is a GlobalResponseNormMlp": lambda: deployed(make_convnext(use_grn=True)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_models_are_refused_with_the_reason(reason):
    with pytest.raises(InputError, match=reason):
        fuse(REFUSED[reason](), torch.bfloat16)
