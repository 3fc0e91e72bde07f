import copy
import gc

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn

import fastadapt as fa
from fastadapt import cuda_graph
from fastadapt.bench.harness import relative_error
from fastadapt.fusion import block_calls
from fastadapt.fusion import frozen_blocks as frozen
from fastadapt.fusion.kernel_choices import Choices
from tests.helpers.kernel_checks import gpu, interpreted


def shaken(model):
    """No bias is zero, and no scale one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def make_vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return shaken(timm.models.VisionTransformer(**(sizes | options), num_classes=0))


def make_convnext(**options):
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}
    return shaken(timm.models.ConvNeXt(**(sizes | options), num_classes=0))


MODELS = {
    "vit": make_vit,
    "vit with layer scale": lambda: make_vit(init_values=0.1),
    "convnext": make_convnext,
    "convnext without layer scale": lambda: make_convnext(ls_init_value=None),
}


@pytest.fixture
def covered(monkeypatch):
    """A CPU counts as a GPU: the operations' references run."""
    monkeypatch.setattr(frozen, "is_covered", lambda images: True)


def assert_as_exact(model, images, dtype, limit=1.3):
    """Within ``limit`` times the error that PyTorch makes under autocast."""
    exact = copy.deepcopy(model).double().forward_features(images.double())
    with torch.no_grad(), torch.autocast(images.device.type, dtype):
        theirs = model.forward_features(images)
        with frozen.fused_blocks(model, images):
            ours = model.forward_features(images)
    assert frozen.caches[model].made
    assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    assert relative_error(ours, exact) <= limit * relative_error(theirs, exact)


@pytest.fixture(params=["sums in norms", "sums in products", "narrow MLPs"])
def way(request, covered, monkeypatch):
    """What is chosen on a GPU, computed by the operations' references."""
    if request.param != "sums in norms":
        monkeypatch.setattr(block_calls, "epilogues_are_fast", lambda x: True)
    if request.param == "narrow MLPs":
        chosen = Choices("kernel", narrow=True, gelu="tanh")
        monkeypatch.setattr(block_calls, "default_choices", lambda *args: chosen)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_as_exact_as_pytorch(way, name):
    side = 64 if "convnext" in name else 32  # a map of one pixel has any strides
    assert_as_exact(MODELS[name](), torch.randn(2, 3, side, side), torch.bfloat16)


def test_blocks_do_not_write_to_their_input(way):
    vit, convnext = make_vit(), make_convnext(ls_init_value=None)
    tokens, image = torch.randn(2, 5, 48), torch.randn(2, 4, 4, 32).permute(0, 3, 1, 2)
    for model, blocks, x in (
        (vit, vit.blocks, tokens),
        (convnext, convnext.stages[2].blocks, image),
    ):
        given = x.clone()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = blocks(x)
            with frozen.fused_blocks(model, x):
                assert relative_error(blocks(x), expected.double()) < 0.05
        assert torch.equal(x, given)


@interpreted
def test_interpreted_blocks(monkeypatch):
    monkeypatch.setattr(block_calls, "epilogues_are_fast", lambda x: True)
    chosen = Choices("kernel", narrow=True, gelu="tanh")
    monkeypatch.setattr(block_calls, "default_choices", lambda *args: chosen)
    vit, convnext = make_vit(depth=1), make_convnext()
    image = torch.randn(1, 3, 5, 16).permute(0, 3, 1, 2)
    for model, blocks, x in (
        (vit, vit.blocks, torch.randn(1, 5, 48)),
        (convnext, convnext.stages[0].blocks, image),
    ):
        exact = copy.deepcopy(blocks).double()(x.double())
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            theirs = relative_error(blocks(x), exact)
            with frozen.fused_blocks(model, x):
                assert relative_error(blocks(x), exact) <= 1.3 * theirs


def test_a_model_in_half_precision_keeps_no_copy(covered):
    model = make_vit().to(torch.bfloat16)
    images = torch.randn(2, 3, 32, 32).to(torch.bfloat16)
    exact = copy.deepcopy(model).double().forward_features(images.double())
    with torch.no_grad():
        theirs = model.forward_features(images)
        with frozen.fused_blocks(model, images):
            ours = model.forward_features(images)
    assert relative_error(ours, exact) <= 1.2 * relative_error(theirs, exact)
    made = frozen.caches[model].made[model.blocks]
    block = made.call.blocks[0]
    assert block.qkv.weight.data_ptr() == model.blocks[0].attn.qkv.weight.data_ptr()
    assert block.fc1.weight.data_ptr() == model.blocks[0].mlp.fc1.weight.data_ptr()


class Other(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.register_forward_hook(print), "0 has hooks"),
        (lambda b: b.mlp.fc2.register_forward_pre_hook(print), "0.mlp.fc2 has hooks"),
        (lambda b: b.mlp.set_submodule("fc1", Other(48, 192)), "0.mlp.fc1 is a Other"),
        (lambda b: b.attn.set_submodule("qkv", nn.Linear(48, 144, bias=False)), "no bias"),
        (lambda b: b.mlp.set_submodule("act", nn.GELU("tanh")), "0.mlp.act approximates GELU"),
        (lambda b: b.mlp.set_submodule("act", nn.ReLU()), "0.mlp.act is a ReLU"),
        (lambda b: setattr(b.attn, "gate", nn.Linear(48, 48)), "0.attn.gate is a Linear"),
        (lambda b: b.attn.set_submodule("q_norm", nn.LayerNorm(16)), "q_norm is a LayerNorm"),
        (lambda b: setattr(b.mlp, "forward", print), "0.mlp has hooks, another forward"),
    ],
)
def test_changed_blocks_run_as_ever(covered, change, reason):
    model = make_vit()
    change(model.blocks[0])
    model.eval()
    assert reason in frozen.why_not_fused(model.blocks)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), autocast, frozen.fused_blocks(model, torch.empty(0)):
        assert "forward" not in model.blocks.__dict__
    assert model.blocks not in frozen.caches[model].made


def test_hooks_on_all_modules_and_training_are_seen():
    block = make_convnext().stages[0].blocks[0]
    assert type(block) is ConvNeXtBlock and frozen.why_not_fused(block) is None
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert frozen.why_not_fused(block) == "there are hooks on all modules"
    hook.remove()
    assert frozen.why_not_fused(block.train()) == "it is in training mode"
    block = make_convnext(conv_mlp=True).stages[0].blocks[0]
    assert "norm is a LayerNorm2d" in frozen.why_not_fused(block)


def test_candidates():
    kinds = [kind for _, kind in frozen.find_blocks(make_convnext())]
    ends, block = block_calls.NormAndConvolution, block_calls.ConvNeXtBlock
    assert kinds == [ends, block, ends, block, ends, block, block, ends, block]
    kinds = [kind for _, kind in frozen.find_blocks(make_vit())]
    assert kinds == [block_calls.PatchConvolution, block_calls.TransformerBlocks]
    for name in ("test_efficientnet", "test_resnet", "test_vit3"):
        model = timm.create_model(name)
        for module, kind in frozen.find_blocks(model):
            expected = model.patch_embed.proj, model.blocks
            assert module is expected[kind is frozen.TransformerBlocks]


def adapted(backbone):
    config = fa.AdaptConfig(rank=8, num_centers=3, input_size=(3, 32, 32))
    return fa.adapt(backbone, config, num_classes=2).train()


@pytest.mark.parametrize("make", [make_vit, make_convnext])
def test_a_frozen_backbone_uses_them(covered, make):
    model, images = adapted(make()), torch.randn(2, 3, 32, 32)
    backbone = model.backbone
    plain = model.backbone_features(images)  # in full precision: as ever
    assert not frozen.caches[backbone].made
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.backbone_features(images)
        assert relative_error(ours, plain.double()) < 0.03
        made = dict(frozen.caches[backbone].made)
        assert made and not any("forward" in module.__dict__ for module in made)
        assert torch.equal(model.backbone_features(images), ours)
        assert frozen.caches[backbone].made == made
        mlp = next(m for m in backbone.modules() if hasattr(m, "fc1"))
        mlp.fc1.weight.mul_(0)
        changed = model.backbone_features(images)
        assert not torch.equal(changed, ours)
        assert frozen.caches[backbone].made == made  # with other values
        mlp.fc1.weight = nn.Parameter(torch.ones_like(mlp.fc1.weight), requires_grad=False)
        assert not torch.equal(model.backbone_features(images), changed)
        assert frozen.caches[backbone].made != made
        with pytest.raises(RuntimeError):  # nothing is left behind
            model.backbone_features(images[:, :2])
        assert not any("forward" in module.__dict__ for module in backbone.modules())
        model.unfreeze()
        assert backbone not in frozen.caches
        model.backbone_features(images).sum().backward()
        assert backbone not in frozen.caches


def features(model, images):
    """Under autocast, and whether anything stood for blocks."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), autocast, frozen.fused_blocks(model, images):
        used = any("forward" in module.__dict__ for module in model.modules())
        return model.forward_features(images), used


@pytest.mark.parametrize("name", MODELS)
def test_changed_values_go_where_the_old_ones_are(covered, name):
    model, images = MODELS[name](), torch.randn(2, 3, 32, 32)

    features(model, images)
    made = list(frozen.caches[model].made.values())
    addresses = [t.data_ptr() for m in made for t in m.tensors()]
    shaken(model)
    again, _ = features(model, images)
    assert [t.data_ptr() for m in made for t in m.tensors()] == addresses
    frozen.release_fused_blocks(model)
    assert torch.equal(features(model, images)[0], again)


class TestInAGraph:
    @pytest.fixture(autouse=True)
    def capturing(self, covered, monkeypatch):
        monkeypatch.setattr(frozen, "is_capturing", lambda images: self.captures)
        self.captures = False

    def test_copies_are_refreshed_before_replays(self):
        model, images = make_vit(), torch.randn(2, 3, 32, 32)
        features(model, images)
        self.captures, before = True, []
        with cuda_graph.collect_before_replays(before):
            assert features(model, images)[1]
        fc1 = frozen.caches[model].made[model.blocks].call.blocks[0].fc1.weight
        frozen.release_fused_blocks(model)  # the graph's own remain
        model.blocks[0].mlp.fc1.weight.fill_(2)
        (refresh,) = before
        refresh()
        assert torch.equal(fc1, torch.full_like(fc1, 2))

    def test_the_first_convolution_follows_its_module(self, monkeypatch):
        monkeypatch.setattr(block_calls, "epilogues_are_fast", lambda x: True)
        for model in (make_vit(), make_convnext()):
            images = torch.randn(2, 3, 32, 32)
            before, _ = features(model, images)
            conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
            conv.weight.mul_(-2)
            changed, _ = features(model, images)
            assert not torch.equal(changed, before)
            frozen.release_fused_blocks(model)
            assert torch.equal(features(model, images)[0], changed)
        # Rows and columns that fill no patch are left out, as PyTorch does.
        odd = torch.randn(2, 3, 35, 33)
        expected = features(model, odd[..., :32, :32])[0]
        assert relative_error(features(model, odd)[0], expected.double()) < 0.05

    def test_the_graphs_of_others_have_the_blocks_themselves(self):
        model, images = make_vit(), torch.randn(2, 3, 32, 32)
        assert features(model, images)[1]
        self.captures = True
        assert not features(model, images)[1]

    def test_nothing_is_made_in_a_capture(self):
        model, images = make_vit(), torch.randn(2, 3, 32, 32)
        self.captures = True
        with cuda_graph.collect_before_replays([]):
            assert not features(model, images)[1]
        assert not frozen.caches[model].made


def test_what_was_kept_goes_with_the_model(covered):
    model = adapted(make_vit())
    with torch.autocast("cpu", torch.bfloat16):
        model.backbone_features(torch.randn(2, 3, 32, 32))
    gc.collect()
    count = len(frozen.caches)
    del model
    gc.collect()
    assert len(frozen.caches) == count - 1


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "batch"), [("vit_base_patch16_224", 32), ("test_vit", 3), ("convnext_base", 8)]
)
def test_gpu_blocks_are_as_exact_as_pytorch(name, batch, dtype):
    model = timm.create_model(name).cuda().eval().requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    size = model.default_cfg["input_size"]
    images = torch.randn(batch, *size, device="cuda").to(memory_format=torch.channels_last)
    assert_as_exact(model, images, dtype)


@gpu
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "convnext_tiny"])
def test_gpu_a_frozen_backbone_in_a_cuda_graph(name):
    model = fa.adapt(timm.create_model(name), num_classes=2).cuda().train()
    images = torch.randn(4, 3, 224, 224, device="cuda")

    def features():
        with torch.autocast("cuda", torch.bfloat16):
            return model.backbone_features(images)

    def run(x):
        return features() + 0 * x.sum()

    expected = features()
    graphed, x = fa.GraphedCall(run), torch.zeros(1, device="cuda")
    torch.testing.assert_close(graphed(x), expected)
    assert graphed.captured and frozen.caches[model.backbone].made
    state = {key: 1.1 * value for key, value in model.backbone.state_dict().items()}
    model.backbone.load_state_dict(state)
    changed = graphed(x)
    assert not torch.equal(changed, expected)
    torch.testing.assert_close(changed, features())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = features()
    captured.zero_()
    graph.replay()
    assert relative_error(captured, changed.double()) < 0.05
