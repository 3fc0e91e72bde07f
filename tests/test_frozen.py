import copy
import gc

import pytest
import timm
import torch
from torch import nn

import fastadapt as fa
from fastadapt import frozen
from fastadapt.bench.harness import relative_error
from tests.kernel_checks import gpu


def make_vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = timm.models.VisionTransformer(**(sizes | options), num_classes=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # no bias is zero, no scale one
    return model.eval().requires_grad_(False)


def tokens(model, device="cpu", rows=(2, 17)):
    return torch.randn(*rows, model.embed_dim, device=device)


@pytest.fixture
def covered(monkeypatch):
    """A CPU counts as a GPU: the operations' references run."""
    monkeypatch.setattr(frozen, "_covered", lambda images: True)


def assert_as_exact(blocks, x, dtype, limit=1.5):
    """Within ``limit`` times the error that PyTorch makes under autocast."""
    exact = copy.deepcopy(blocks).double()(x.double())
    with torch.no_grad(), torch.autocast(x.device.type, dtype):
        theirs = blocks(x)
        ours = frozen.FrozenBlocks(blocks, dtype)(x)
    assert ours.dtype == theirs.dtype == x.dtype
    assert relative_error(ours, exact) <= limit * relative_error(theirs, exact)


@pytest.mark.parametrize("scale", [None, 0.1])
def test_blocks_are_as_exact_as_pytorch(scale):
    model = make_vit(init_values=scale)
    assert frozen.why_not(model.blocks) is None
    assert_as_exact(model.blocks, tokens(model), torch.bfloat16)


def test_a_model_in_half_precision_keeps_no_copy():
    model = make_vit().to(torch.bfloat16)
    x = tokens(model).to(torch.bfloat16)
    stand_in = frozen.FrozenBlocks(model.blocks, torch.bfloat16)
    first = stand_in.blocks[0]
    assert first.attn is model.blocks[0].attn
    assert first.fc1.weight.data_ptr() == model.blocks[0].mlp.fc1.weight.data_ptr()
    exact = copy.deepcopy(model.blocks).double()(x.double())
    with torch.no_grad():
        error = relative_error(stand_in(x), exact)
        assert error <= 1.2 * relative_error(model.blocks(x), exact)


class Other(nn.Linear):
    pass


def replace(block, name, module):
    parent = block.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], module)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.register_forward_hook(print), "0 has hooks"),
        (lambda b: b.mlp.fc2.register_forward_pre_hook(print), "0.mlp.fc2 has hooks"),
        (lambda b: replace(b, "mlp.fc1", Other(48, 192)), "has a Other as fc1"),
        (lambda b: replace(b, "attn.qkv", nn.Linear(48, 144, bias=False)), "no bias"),
        (lambda b: replace(b, "mlp.act", nn.GELU("tanh")), "approximates GELU"),
        (lambda b: replace(b, "attn.q_norm", nn.LayerNorm(16)), "has a LayerNorm as q_norm"),
        (lambda b: setattr(b.mlp, "forward", print), "another forward"),
        (lambda b: b.train(), "training mode"),
    ],
)
def test_other_blocks_run_as_ever(change, reason):
    model = make_vit()
    change(model.blocks[0])
    if "training" not in reason:
        model.eval()
    assert reason in frozen.why_not(model.blocks)
    assert frozen.frozen_blocks(model.blocks, torch.bfloat16) is None


def test_other_backbones_run_as_ever():
    for name in ("test_efficientnet", "test_convnext"):
        blocks = getattr(timm.create_model(name), "blocks", nn.Module())
        assert frozen.why_not(blocks) is not None


def adapted():
    config = fa.AdaptConfig(rank=8, num_centers=3, input_size=(3, 32, 32))
    return fa.adapt(make_vit(), config, num_classes=2).train()


def test_a_frozen_backbone_uses_them(covered, monkeypatch):
    model, images = adapted(), torch.randn(2, 3, 32, 32)
    blocks = model.backbone.blocks
    calls = []
    run = frozen.FrozenBlocks.__call__
    monkeypatch.setattr(frozen.FrozenBlocks, "__call__", lambda s, x: calls.append(1) or run(s, x))

    plain = model.backbone_features(images)  # in full precision: as ever
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.backbone_features(images)
        assert len(calls) == 1 and "forward" not in blocks.__dict__
        assert relative_error(ours, plain.double()) < 0.02
        before = frozen._made[blocks][1]
        model.backbone_features(images)
        assert frozen._made[blocks][1] is before
        blocks[1].mlp.fc1.weight.mul_(0)
        assert not torch.equal(model.backbone_features(images), ours)
        assert frozen._made[blocks][1] is not before
        with pytest.raises(RuntimeError):  # nothing is left behind
            model.backbone_features(images[:, :2])
        assert "forward" not in blocks.__dict__
        assert len(model.state_dict()) == len(copy.deepcopy(model).state_dict())
        calls.clear()
        model.unfreeze()
        assert blocks not in frozen._made
        model.backbone_features(images).sum().backward()
    assert not calls


def test_what_was_kept_goes_with_the_model(covered):
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        model.backbone_features(torch.randn(2, 3, 32, 32))
    count = len(frozen._made)
    del model
    gc.collect()
    assert len(frozen._made) == count - 1


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "batch"), [("vit_base_patch16_224", 8), ("test_vit", 3)])
def test_gpu_blocks_are_as_exact_as_pytorch(name, batch, dtype):
    model = timm.create_model(name).cuda().eval().requires_grad_(False)
    x = torch.randn(batch, 197, model.embed_dim, device="cuda")
    assert_as_exact(model.blocks, x, dtype)


@gpu
def test_gpu_a_frozen_backbone_in_a_cuda_graph():
    model = fa.adapt(timm.create_model("vit_small_patch16_224"), num_classes=2).cuda().train()
    images = torch.randn(4, 3, 224, 224, device="cuda")

    def features():
        with torch.autocast("cuda", torch.bfloat16):
            return model.backbone_features(images)

    expected = features()
    assert model.backbone.blocks in frozen._made
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = features()
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)
