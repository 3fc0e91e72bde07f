import copy
import io
import json

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

import fastadapt as fa
from fastadapt.export import fold as fold_module
from fastadapt.export.fold import FoldedClusterAttention, fold_with_report, layer_error
from fastadapt.kernels import quaternion_matrix
from fastadapt.layers.lora import LoRASlice
from fastadapt.lora import LoRAConfig, apply_lora, lora_layers


def vit(**kwargs):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    small["num_classes"] = 0
    return timm.create_model("vit_tiny_patch16_224", **{**small, **kwargs}).eval()


def randomize(model):
    """Low-rank adapters start as zero: give them something to fold."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for b in layer.lora_B.values():
                b.normal_(std=0.3)
    return model


def adapted(num_classes=3, **kwargs):
    lora = LoRAConfig(r=4, alpha=7.0, parts="qv", targets=("qkv", "attn.proj", "fc1"))
    config = fa.AdaptConfig(depth=2, rank=8, num_centers=5, lora=lora)
    return randomize(fa.adapt(vit(**kwargs), config, num_classes))


def check_same(model, x, bound=1e-5):
    """The folded model's outputs are the model's, to ``bound`` of their scale."""
    want = copy.deepcopy(model).eval()(x)
    got = fa.fold(model)(x)
    assert ((got - want).abs().max() / want.abs().max()).item() < bound
    return want


class TestLoRA:
    @pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
    def test_weight_is_the_formula_with_alpha_unlike_r(self, dtype, bound):
        base = nn.Linear(6, 9).to(dtype)
        layer = fa.LoRALinear(base, [LoRASlice("all", 0, 9, 4, 7.0 / 4)])
        randomize(nn.Sequential(layer))
        folded = fa.fold(layer)
        assert type(folded) is nn.Linear
        a, b = layer.lora_A["all"].double(), layer.lora_B["all"].double()
        want = (base.weight.double() + 1.75 * (b @ a)).to(dtype)
        assert torch.equal(folded.weight, want)
        assert torch.equal(folded.bias, base.bias)
        assert layer_error(layer, folded, torch.randn(5, 6)) < bound

    def test_fused_qkv_slices_change_their_rows_alone(self):
        slices = [LoRASlice("q", 0, 4, 2, 0.5), LoRASlice("v", 8, 12, 3, 2.0)]
        layer = fa.LoRALinear(nn.Linear(6, 12, bias=False), slices)
        randomize(nn.Sequential(layer))
        folded = fa.fold(layer)
        assert folded.bias is None
        assert torch.equal(folded.weight[4:8], layer.base.weight[4:8])
        assert not torch.equal(folded.weight[:4], layer.base.weight[:4])
        x = torch.randn(7, 6)
        torch.testing.assert_close(folded(x), layer(x))

    def test_merged_in_fp64_even_where_the_model_is_bf16(self):
        layer = fa.LoRALinear(nn.Linear(64, 64), [LoRASlice("all", 0, 64, 8, 2.0)])
        randomize(nn.Sequential(layer))
        layer.bfloat16()
        want = (layer.base.weight.double() + layer.delta(torch.float64)).bfloat16()
        assert torch.equal(fa.fold(layer).weight, want)

    def test_code_that_reads_the_weight_keeps_working(self):
        attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        attention.out_proj = fa.LoRALinear(attention.out_proj, [LoRASlice("all", 0, 8, 2, 1.0)])
        randomize(attention)
        x = torch.randn(2, 3, 8)
        folded, report = fold_with_report(attention)
        assert isinstance(folded.out_proj, nn.Linear)
        torch.testing.assert_close(folded(x, x, x)[0], attention(x, x, x)[0])
        assert report.layers[0].probe == "noise"

    def test_a_layer_in_two_places_stays_one(self):
        model = nn.Sequential(fa.LoRALinear(nn.Linear(4, 4), [LoRASlice("all", 0, 4, 2, 1.0)]))
        model.append(model[0])
        randomize(model)
        folded = fa.fold(model)
        assert folded[0] is folded[1]
        assert type(folded[0]) is nn.Linear


@pytest.mark.parametrize("rotation,scale", [(False, False), (True, False), (True, True)])
def test_quaternion(rotation, scale):
    layer = fa.QuaternionLinear(8, 12, rotation=rotation, scale=scale)
    folded = fa.fold(layer)
    assert type(folded) is nn.Linear
    names = ("r_weight", "i_weight", "j_weight", "k_weight")
    weights = [getattr(layer, name).double() for name in names]
    factor = layer.scale_param.double() if scale else None
    matrix = quaternion_matrix(*weights, rotation=rotation, scale=factor)
    assert torch.equal(folded.weight, matrix.float().t())  # Hamilton: bit for bit
    x = torch.randn(5, 8)
    torch.testing.assert_close(folded(x), layer(x))


@pytest.mark.parametrize("mode", ["channel", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cluster_attention(mode, dtype):
    layer = fa.ClusterAttention(12, 5, rank=6, mode=mode, num_tokens=7, proj_drop=0.5).to(dtype)
    folded, report = fold_with_report(layer, torch.randn(3, 7, 12, dtype=dtype))
    assert isinstance(folded, FoldedClusterAttention)
    assert report.layers[0].probe == "example"
    assert report.max_error < (1e-6 if dtype == torch.float32 else 1e-14)
    x = torch.randn(4, 7, 12, dtype=dtype) + 1
    torch.testing.assert_close(folded(x), layer.eval()(x))


class TestModel:
    def test_same_outputs_other_layers(self):
        model = adapted()
        want = check_same(model, torch.randn(3, 3, 32, 32))
        base = fa.adapt(vit(), fa.AdaptConfig(depth=2, rank=8, num_centers=5), 3).eval()
        assert (want - base(torch.randn(3, 3, 32, 32))).abs().max() > 1e-3
        folded = fa.fold(model)
        ours = (fa.LoRALinear, fa.ClusterAttention, fa.QuaternionLinear)
        assert not any(isinstance(module, ours) for module in folded.modules())
        assert not folded.training
        assert not any(p.requires_grad for p in folded.parameters())
        assert not any(getattr(module, "p", 0) for module in folded.modules())

    def test_the_update_matters(self):
        model = adapted()
        before = copy.deepcopy(model)
        for layer in lora_layers(before).values():
            for b in layer.lora_B.values():
                nn.init.zeros_(b)
        x = torch.randn(2, 3, 32, 32)
        assert (fa.fold(model)(x) - fa.fold(before)(x)).abs().max() > 1e-2

    def test_input_is_untouched(self):
        model = adapted().train()
        state = copy.deepcopy(model.state_dict())
        flags = [(p.requires_grad, p.data_ptr()) for p in model.parameters()]
        training = [module.training for module in model.modules()]
        kinds = [type(module) for module in model.modules()]
        folded, _ = fold_with_report(model, torch.randn(2, 3, 32, 32))
        with torch.no_grad():
            for parameter in folded.parameters():
                parameter.add_(1)
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert flags == [(p.requires_grad, p.data_ptr()) for p in model.parameters()]
        assert training == [module.training for module in model.modules()]
        assert kinds == [type(module) for module in model.modules()]
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert not any(module._forward_pre_hooks for module in folded.modules())

    def test_interface_of_timm_survives(self):
        model = adapted().eval()
        folded = fa.fold(model)
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(folded.forward_features(x), model.forward_features(x))
        assert folded.num_classes == 3

    def test_classifier_that_is_not_used_goes(self):
        model = fa.adapt(timm.create_model("test_resnet"), fa.AdaptConfig(rank=8), 2)
        folded, report = fold_with_report(model)
        assert report.dropped == ("backbone.fc",)
        assert isinstance(folded.backbone.fc, nn.Identity)
        assert isinstance(model.backbone.fc, nn.Linear)
        check_same(model, torch.randn(2, 3, 64, 64))

    def test_a_feature_function_may_use_the_classifier(self):
        def features(backbone, x):
            return backbone(x).unsqueeze(1)

        config = fa.AdaptConfig(rank=8, features=features, num_prefix_tokens=0)
        model = fa.adapt(vit(num_classes=7), config, 2)
        assert fold_with_report(model)[1].dropped == ()
        check_same(model, torch.randn(2, 3, 32, 32))

    def test_any_module_with_our_layers(self):
        model = nn.Sequential(nn.Linear(6, 8), fa.QuaternionLinear(8, 8), nn.Dropout(0.5))
        check_same(model, torch.randn(4, 6))

    def test_compiled_model(self):
        model = torch.compile(adapted())
        assert type(fa.fold(model)) is fa.AdaptedModel

    def test_nothing_to_fold(self):
        _, report = fold_with_report(nn.Linear(3, 3))
        assert report.layers == ()
        assert report.summary == "no layers to fold"


def test_report():
    _, report = fold_with_report(adapted(), torch.randn(2, 3, 32, 32))
    assert [row.name for row in report.layers][:2] == [
        "backbone.blocks.0.attn.qkv",
        "backbone.blocks.0.attn.proj",
    ]
    assert all(row.probe == "example" and row.error <= 1e-6 for row in report.layers)
    lora = [row for row in report.layers if row.kind == "LoRALinear"]
    assert all(row.weight_change > 0.1 for row in lora)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["folded"].startswith("Linear 48")
    console = Console(width=160, file=io.StringIO())
    console.print(report)
    assert "adapter.blocks.1.attn" in console.file.getvalue()
    assert "6 LoRALinear, 2 ClusterAttention" in report.summary


class TestRefused:
    def test_nan_names_the_layer(self):
        model = adapted()
        with torch.no_grad():
            model.backbone.blocks[1].attn.qkv.lora_A["q"][0, 0] = float("nan")
        with pytest.raises(fa.InputError, match=r"blocks\.1\.attn\.qkv.*lora_A\.q holds 1 NaN"):
            fa.fold(model)

    def test_nan_elsewhere(self):
        model = adapted()
        with torch.no_grad():
            model.adapter.norm1.weight[0] = float("inf")
        with pytest.raises(fa.InputError, match=r"adapter\.norm1\.weight"):
            fa.fold(model)

    def test_overflow_of_the_merged_weight(self):
        layer = fa.LoRALinear(nn.Linear(4, 4), [LoRASlice("all", 0, 4, 1, 1e3)]).half()
        with torch.no_grad():
            layer.lora_A["all"].fill_(100)
            layer.lora_B["all"].fill_(100)
        with pytest.raises(fa.InputError, match=r"0: folded to torch\.float16"):
            fa.fold(nn.Sequential(layer))

    @pytest.mark.parametrize("example", [None, torch.zeros(2, 3, 32, 32)])
    def test_a_wrong_fold_is_caught_and_named(self, monkeypatch, example):
        def wrong(layer):
            change = fold_lora(layer)
            change.layer.weight.data[0, 0] += 0.01
            return change

        fold_lora = fold_module.RULES[fa.LoRALinear]
        monkeypatch.setitem(fold_module.RULES, fa.LoRALinear, wrong)
        with pytest.raises(fa.InputError, match=r"backbone\.blocks\.0\.attn\.qkv \(LoRALinear\)"):
            fold_with_report(adapted(), example)

    def test_a_subclass_that_does_something_else(self):
        class Doubled(fa.QuaternionLinear):
            def forward(self, x):
                return 2 * super().forward(x)

        with pytest.raises(fa.InputError, match="differs from it"):
            fa.fold(nn.Sequential(Doubled(8, 8)))


class TestPEFT:
    """Folding what PEFT trained gives what PEFT itself computes."""

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"lora_alpha": 13},
            {"lora_alpha": 8, "use_rslora": True},
            {"rank_pattern": {"attn.proj": 2}, "alpha_pattern": {"qkv": 5}},
            {"bias": "all"},
        ],
        ids=["alpha", "rslora", "patterns", "bias"],
    )
    def test_equals_peft(self, tmp_path, kwargs):
        peft = pytest.importorskip("peft")
        base = vit()
        config = {"r": 4, "lora_alpha": 4, "target_modules": ["qkv", "attn.proj", "fc1"], **kwargs}
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_B" in name or (kwargs.get("bias") and name.endswith(".bias")):
                    parameter.normal_(std=0.3)
        theirs.save_pretrained(tmp_path)
        ours = copy.deepcopy(base)
        fa.load_peft(ours, tmp_path)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            want, folded = theirs(x), fa.fold(ours)(x)
            assert (want - base(x)).abs().max() > 1e-2
        torch.testing.assert_close(folded, want, rtol=1e-5, atol=1e-5)


def test_folding_a_plain_backbone():
    model = vit()
    apply_lora(model, LoRAConfig(r=2))
    check_same(randomize(model), torch.randn(2, 3, 32, 32))
