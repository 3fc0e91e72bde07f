"""Which parameters decay, and how fast each layer learns."""

import pytest
import timm
import torch

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.train import TrainConfig
from fastadapt.train.optimizer import make_optimizer
from fastadapt.train.step import training_step

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=1.0)


def by_name(model, optimizer, key):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g.get(key, 1.0) for g in optimizer.param_groups for p in g["params"]}


def adapted(name="test_vit", **config):
    module = timm.create_model(name, num_classes=0)
    return fa.adapt(module, fa.AdaptConfig(**{**vars(ADAPT), **config}), 3)


def test_vectors_decay_only_if_asked_for():
    model = adapted()
    decay = by_name(model, make_optimizer(model, TrainConfig(weight_decay=0.01)), "weight_decay")
    assert decay["head.weight"] == 0.01 and decay["head.bias"] == decay["adapter.norm1.weight"] == 0
    everything = TrainConfig(decay="all", weight_decay=0.5, layer_decay=0.9)
    model.unfreeze()
    optimizer = make_optimizer(model, everything)
    assert set(by_name(model, optimizer, "weight_decay").values()) == {0.5}


def test_each_layer_learns_more_slowly_than_the_one_after_it():
    model = adapted().unfreeze()
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5))
    scales = by_name(model, optimizer, "lr_scale")
    assert set(scales) == {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = len(model.backbone.blocks)
    for index in range(blocks):
        assert scales[f"backbone.blocks.{index}.mlp.fc1.weight"] == 0.5 ** (blocks - index)
    assert scales["backbone.patch_embed.proj.weight"] == 0.5 ** (blocks + 1)
    assert scales["head.weight"] == scales["adapter.norm1.weight"] == 1
    # Every parameter moves by its own rate: Adam's first step is the rate itself.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(layer_decay=0.5, weight_decay=0.0, optimizer="adam")
    step = training_step(model, make_optimizer(model, config))
    step(1e-3, torch.tensor([0, 1]), torch.randn(2, *model.spec.input_size))
    for name in ("backbone.blocks.0.mlp.fc2.weight", "head.weight"):
        moved = (model.get_parameter(name) - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * scales[name], rel=1e-2)


def test_layers_must_be_known():
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4))
    config = fa.AdaptConfig(
        **{**vars(ADAPT), "input_size": (3, 16, 16), "features": lambda m, x: m(x)},
    )
    model = fa.adapt(backbone, fa.AdaptConfig(**{**vars(config), "layout": "channels_first"}), 2)
    with pytest.raises(InputError, match=r"layer_decay is 0.5.* Sequential are not known"):
        make_optimizer(model, TrainConfig(layer_decay=0.5))
