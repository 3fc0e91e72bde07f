import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import fastadapt as fa
from fastadapt.checkpoint import load_adapter, save_adapter
from fastadapt.errors import InputError
from fastadapt.export.backends.onnx import export_onnx
from fastadapt.pyramid import (
    PYRAMIDS,
    pyramid_deviations,
    pyramid_features,
    pyramid_levels,
    to_grid,
)
from fastadapt.train.shared_backbone import SharedBackbone


def config(features="pyramid", size=64):
    sizes = {"rank": 4, "num_centers": 3, "mlp_ratio": 0.5, "input_size": (3, size, size)}
    return fa.AdaptConfig(**sizes, features=features)


@pytest.fixture
def resnet():
    return timm.create_model("test_resnet", num_classes=0).eval()


def test_the_maps_of_all_strides_lie_side_by_side(resnet):
    images = torch.rand(2, 3, 72, 56)
    maps = resnet.forward_intermediates(images, intermediates_only=True)[1:]  # without stride 2
    assert [tuple(m.shape[-2:]) for m in maps] == [(18, 14), (9, 7), (5, 4), (3, 2)]
    found = pyramid_features(resnet, images)
    assert found.shape == (2, sum(m.shape[1] for m in maps), 3, 2)
    start = 0
    for index, level in enumerate(maps):
        grid = to_grid(level, [m.shape[-2:] for m in maps[index + 1 :]])
        wanted = F.layer_norm(grid.movedim(1, -1), grid.shape[1:2]).movedim(-1, 1)
        torch.testing.assert_close(found[:, start : start + level.shape[1]], wanted)
        start += level.shape[1]


def test_deviations_within_the_cells_follow_the_means(resnet):
    images = torch.rand(2, 3, 64, 64)
    found = pyramid_deviations(resnet, images)
    means = pyramid_features(resnet, images)
    torch.testing.assert_close(found[:, : means.shape[1]], means)
    level = resnet.forward_intermediates(images, intermediates_only=True)[1]  # [2, C, 16, 16]
    cells = level.unflatten(3, (2, 8)).unflatten(2, (2, 8)).double()
    wanted = cells.var((3, 5), unbiased=False).clamp(min=1e-6).sqrt().movedim(1, -1)
    wanted = F.layer_norm(wanted, wanted.shape[-1:]).movedim(-1, 1)
    part = found[:, means.shape[1] :][:, : level.shape[1]]
    torch.testing.assert_close(part, wanted.float(), atol=1e-3, rtol=1e-3)


def test_cells_are_means():
    x = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(to_grid(x, [torch.Size((3, 3))]), F.avg_pool2d(x, 2))
    odd = torch.rand(1, 2, 5, 7)  # strides round up, or down
    mean = odd[..., :2, :2].mean((2, 3))
    torch.testing.assert_close(to_grid(odd, [torch.Size((3, 4))])[..., 0, 0], mean)
    mean = odd[..., :3, :3].mean((2, 3))
    torch.testing.assert_close(to_grid(odd, [torch.Size((2, 3))])[..., 0, 0], mean)
    assert to_grid(odd, [torch.Size((2, 2))]).shape == (1, 2, 2, 2)  # no halving
    edges = to_grid(torch.ones(1, 1, 19, 19), [torch.Size((10, 10))])
    torch.testing.assert_close(edges, torch.ones(1, 1, 10, 10))  # what is beyond does not count


def test_backbones_of_one_resolution_have_none(resnet):
    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    assert pyramid_levels(vit) == pyramid_levels(nn.Conv2d(3, 4, 1)) == []
    with pytest.raises(InputError, match="no maps of several resolutions"):
        fa.adapt(vit, config(size=32), 2)
    plain = fa.adapt(vit, config("auto", 32), 2)
    assert plain.spec.layout == "tokens" and plain.spec.dim == vit.num_features
    assert fa.adapt(resnet, config("auto"), 2).feature_fn is pyramid_features
    assert fa.adapt(resnet, config("last"), 2).spec.dim == resnet.num_features


def test_channels_last_backbones_give_channels_first():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1), embed_dim=16,
        num_heads=(2, 2), img_size=56,
    )  # fmt: skip
    model = fa.adapt(swin, config(size=56), 2)
    assert (model.spec.layout, model.spec.dim, model.spec.num_tokens) == ("channels_first", 48, 49)
    assert model(torch.rand(2, 3, 56, 56)).shape == (2, 2)


@pytest.mark.parametrize("features", PYRAMIDS)
def test_train_save_load_fold_and_export(resnet, tmp_path, features):
    import numpy as np
    import onnxruntime

    images = torch.rand(3, 3, 64, 64)
    model = fa.adapt(resnet, config(features), 2)
    model.train()
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 0])).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.adapter.parameters())
    model.unfreeze()
    model(images).sum().backward()
    trained = [n for n, p in model.backbone.named_parameters() if p.requires_grad]
    gradients = [model.backbone.get_parameter(name).grad for name in trained]
    assert trained and all(g is not None and g.isfinite().all() for g in gradients)
    model.freeze()
    save_adapter(model.eval(), tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(images)
        again = timm.create_model("test_resnet", num_classes=0).eval()
        loaded = load_adapter(tmp_path / "adapter", again)
        assert loaded.feature_fn is PYRAMIDS[features] and loaded.config.features == features
        folded = fa.fold(model)
        torch.testing.assert_close(folded(images), wanted, atol=1e-5, rtol=1e-5)
    export_onnx(folded, tmp_path / "model.onnx", input_size=(3, 64, 64))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_models_of_other_features_share_no_pass(resnet):
    first, second = fa.adapt(resnet, config(), 2), fa.adapt(resnet, config(), 3)
    assert SharedBackbone([first, second]).shared
    other = fa.adapt(resnet, config("last"), 3)
    shared = SharedBackbone([first, other])
    assert not shared.shared
