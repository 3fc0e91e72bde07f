import json

import pytest
import timm
import torch
from torch import nn

import fastadapt as fa
from fastadapt.files import read_tensors, write_tensors
from fastadapt.layers.lora import LoRASlice
from fastadapt.lora import LoRAConfig, apply_lora, lora_layers, replaced_parameters


def vit():
    return timm.create_model("test_vit", pretrained=False, num_classes=0).eval()


def perturb(model):
    """Low-rank adapters start as zero: give them something to do."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for b in layer.lora_B.values():
                b.normal_()


class TestLayer:
    def test_starts_as_its_base(self):
        base = nn.Linear(6, 9)
        x = torch.randn(2, 6)
        want = base(x)
        assert torch.equal(fa.LoRALinear(base, [LoRASlice("all", 0, 9, 2, 0.5)])(x), want)

    def test_is_the_formula_on_its_rows(self):
        base = nn.Linear(6, 9)
        slices = [LoRASlice("q", 0, 3, 2, 0.5), LoRASlice("v", 6, 9, 4, 3.0)]
        layer = fa.LoRALinear(base, slices)
        perturb(nn.Sequential(layer))
        weight = base.weight.clone()
        weight[0:3] += 0.5 * layer.lora_B["q"] @ layer.lora_A["q"]
        weight[6:9] += 3.0 * layer.lora_B["v"] @ layer.lora_A["v"]
        x = torch.randn(4, 6)
        want = nn.functional.linear(x, weight, base.bias)
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer.weight, weight)

    def test_code_that_reads_the_weight_sees_the_update(self):
        attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        x = torch.randn(1, 3, 8)
        before = attention(x, x, x)[0]
        attention.out_proj = fa.LoRALinear(attention.out_proj, [LoRASlice("all", 0, 8, 2, 1.0)])
        torch.testing.assert_close(attention(x, x, x)[0], before)
        perturb(attention)
        assert (attention(x, x, x)[0] - before).abs().max() > 0.1


class TestTargets:
    def test_fused_qkv_is_chosen_by_default_and_whole(self):
        model = vit()
        names = apply_lora(model, LoRAConfig(r=3))
        assert names == [f"blocks.{i}.attn.qkv" for i in range(len(model.blocks))]
        layer = model.blocks[0].attn.qkv
        assert layer.lora_A["all"].shape == (3, layer.in_features)

    def test_parts_of_a_fused_qkv(self):
        model = vit()
        x = torch.randn(2, 3, 160, 160)
        seen = {}
        handle = model.blocks[0].attn.qkv.register_forward_hook(lambda m, i, o: seen.update(a=o))
        model(x)
        handle.remove()
        apply_lora(model, LoRAConfig(r=3, parts="qv"))
        perturb(model)
        model.blocks[0].attn.qkv.register_forward_hook(lambda m, i, o: seen.update(b=o))
        model(x)
        q, k, v = (seen["b"] - seen["a"]).chunk(3, dim=-1)
        assert q.abs().max() > 0 and v.abs().max() > 0 and not k.any()

    def test_separate_projections_follow_the_parts_too(self):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

        assert apply_lora(Attention(), LoRAConfig(parts="kv")) == ["k_proj", "v_proj"]

    def test_patterns_and_rslora(self):
        model = vit()
        config = LoRAConfig(
            r=4,
            alpha=8,
            targets=("attn.proj", "fc1"),
            rank_pattern={r"blocks\.0\..*": 2},
            alpha_pattern={"fc1": 32},
            use_rslora=True,
        )
        apply_lora(model, config)
        first, other = model.blocks[0].mlp.fc1.slices[0], model.blocks[1].attn.proj.slices[0]
        assert (first.r, first.scaling) == (2, 32 / 2**0.5)
        assert (other.r, other.scaling) == (4, 8 / 4**0.5)

    def test_no_match_lists_what_there_is(self):
        with pytest.raises(fa.InputError, match=r"match no linear layer.*fc1.*qkv"):
            apply_lora(vit(), LoRAConfig(targets=("attention",)))

    @pytest.mark.parametrize(
        ("kwargs", "says"), [({"r": 0}, "r is 0"), ({"parts": "qx"}, "'qx'"), ({"parts": ""}, "''")]
    )
    def test_impossible_settings(self, kwargs, says):
        with pytest.raises(fa.InputError, match=says):
            LoRAConfig(**kwargs)

    def test_ranks_larger_than_the_layer(self):
        with pytest.raises(fa.InputError, match="rank is 60000 for blocks"):
            apply_lora(vit(), LoRAConfig(r=60_000))

    def test_in_an_adapted_model_only_what_was_added_trains(self):
        config = fa.AdaptConfig(
            rank=8, num_centers=3, mlp_ratio=0.5, lora=LoRAConfig(r=2, dropout=0.5)
        )
        model = fa.adapt(vit(), config, 3).train()
        assert all(
            p.requires_grad == (not n.startswith("backbone.") or ".lora_" in n)
            for n, p in model.named_parameters()
        )
        qkv = model.backbone.blocks[0].attn.qkv
        assert qkv.dropout.training and not model.backbone.blocks[0].training
        model(torch.randn(2, *model.spec.input_size)).sum().backward()
        assert qkv.lora_B["all"].grad.abs().sum() > 0 and qkv.base.weight.grad is None


class TestPeft:
    """Against PEFT itself: what it saves, ours must reproduce."""

    def trained(self, folder, model=None, **kwargs):
        peft = pytest.importorskip("peft")
        model = model or vit()
        settings = {"r": 4, "lora_alpha": 7, "target_modules": ["qkv", "fc1"], **kwargs}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if "lora_" in name or p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        wrapped.save_pretrained(folder)
        return wrapped

    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"use_rslora": True},
            {"rank_pattern": {"blocks.0.attn.qkv": 2}, "alpha_pattern": {"fc1": 3}},
            {"bias": "all"},
            {"bias": "lora_only"},
            {"fan_in_fan_out": True},
        ],
        ids=lambda k: "-".join(k) or "plain",
    )
    def test_outputs_equal_pefts(self, tmp_path, kwargs):
        backbone = vit()
        state = {k: v.clone() for k, v in backbone.state_dict().items()}
        wrapped = self.trained(tmp_path, backbone, **kwargs)
        ours = vit()
        ours.load_state_dict(state)
        x = torch.randn(2, 3, 160, 160)
        plain = ours(x)
        names = fa.load_peft(ours, tmp_path)
        assert len(names) == 2 * len(ours.blocks)
        torch.testing.assert_close(ours(x), wrapped(x), rtol=1e-5, atol=1e-5)
        assert (ours(x) - plain).abs().max() > 1e-3

    @pytest.mark.parametrize("targets", [("qkv",), ("proj",), "all-linear"])
    def test_more_of_them_are_refused_until_it_is_merged(self, tmp_path, targets):
        self.trained(tmp_path, vit(), target_modules=["blocks.0.attn.qkv"])
        ours = vit()
        names = fa.load_peft(ours, tmp_path)
        config = fa.AdaptConfig(lora=LoRAConfig(r=2, targets=targets))
        with pytest.raises(fa.InputError, match=r"already \(blocks.0.attn.qkv and 0 more\)"):
            fa.adapt(ours, config, 3)
        assert list(lora_layers(ours)) == names  # as it was
        adapted = fa.adapt(fa.fold(ours), config, 3)
        assert not any("base" in name for name in lora_layers(adapted.backbone))

    def test_modules_to_save_replace_the_classifier(self, tmp_path):
        backbone = timm.create_model("test_vit", num_classes=5).eval()
        state = {k: v.clone() for k, v in backbone.state_dict().items()}
        wrapped = self.trained(tmp_path, backbone, modules_to_save=["head"])
        ours = timm.create_model("test_vit", num_classes=5).eval()
        ours.load_state_dict(state)
        fa.load_peft(ours, tmp_path)
        x = torch.randn(2, 3, 160, 160)
        torch.testing.assert_close(ours(x), wrapped(x), rtol=1e-5, atol=1e-5)
        assert replaced_parameters(ours) == {"head.bias", "head.weight"}

    @pytest.mark.parametrize("targets", ["all-linear", ["qkv", "head"], "blocks.*qkv|head"])
    def test_a_head_among_the_targets_and_saved_whole(self, tmp_path, targets):
        backbone = timm.create_model("test_vit", num_classes=5).eval()
        state = {k: v.clone() for k, v in backbone.state_dict().items()}
        wrapped = self.trained(tmp_path, backbone, target_modules=targets, modules_to_save=["head"])
        ours = timm.create_model("test_vit", num_classes=5).eval()
        ours.load_state_dict(state)
        names = fa.load_peft(ours, tmp_path)
        assert names and "head" not in names
        x = torch.randn(2, 3, 160, 160)
        assert torch.equal(ours(x), wrapped(x))
        torch.testing.assert_close(fa.fold(ours)(x), wrapped(x), rtol=1e-5, atol=1e-5)

    def test_a_head_that_is_listed_and_not_there(self, tmp_path):
        backbone = timm.create_model("test_vit", num_classes=5).eval()
        self.trained(tmp_path, backbone, target_modules=["qkv", "head"], modules_to_save=["head"])
        file = tmp_path / "adapter_model.safetensors"
        tensors, _ = read_tensors(file)
        write_tensors(file, {k: t for k, t in tensors.items() if "head.weight" not in k})
        with pytest.raises(fa.InputError, match=r"lists 'head' in modules_to_save.*its weight"):
            fa.load_peft(timm.create_model("test_vit", num_classes=5), tmp_path)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"rank_pattern": {"(a+)+b": 4}}, "repeats a group"),
            ({"alpha_pattern": {"[": 4}}, "no regular expression"),
            ({"rank_pattern": {"qkv": 2**40}}, "rank"),
            ({"rank_pattern": {"qkv": "4"}}, "rank_pattern"),
            ({"rank_pattern": ["qkv"]}, "rank_pattern"),
            ({"r": "4"}, "r is '4'"),
            ({"r": -4}, "r is -4"),
            ({"lora_alpha": float("nan")}, "alpha is nan"),
            ({"lora_alpha": "7"}, "alpha is '7'"),
            ({"lora_dropout": 2}, "dropout is 2"),
            ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
            ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
        ],
    )
    def test_every_value_is_typed_and_bounded(self, tmp_path, change, says):
        self.trained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        model = vit()
        with pytest.raises(fa.InputError, match=says):
            fa.load_peft(model, tmp_path)
        assert not lora_layers(model)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"target_modules": ["fc1"]}, "is none of its target_modules"),
            ({"target_modules": r"blocks\.0\.attn\.qkv"}, "is none of its target_modules"),
            ({"exclude_modules": ["blocks.1.attn.qkv"]}, "is none of its target_modules"),
            ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "is none of its target_mod"),
            ({"target_modules": None}, "target_modules is empty"),
            ({"target_modules": "(a+)+"}, "take for ever"),
            ({"bias": "NONE"}, "bias is 'NONE'"),
            ({"task_type": "{}"}, "task_type is '{}'"),
            ({"eva_config": 3}, "eva_config is 3"),
            ({"velora_config": []}, "velora_config is"),
            ({"layers_to_transform": ["qkv"]}, "layers_to_transform is"),
        ],
    )
    def test_values_that_peft_would_understand_otherwise(self, tmp_path, change, says):
        self.trained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(fa.InputError, match=says):
            fa.load_peft(vit(), tmp_path)

    def test_variants_are_refused_by_name(self, tmp_path):
        self.trained(tmp_path, use_dora=True)
        with pytest.raises(fa.InputError, match="DoRA"):
            fa.load_peft(vit(), tmp_path)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"peft_type": "LOHA"}, "'LOHA'"),
            ({"r": 3}, "rank 3, its tensors have 4"),
            ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
            ({"layer_replication": [[0, 2]]}, "layer replication"),
        ],
    )
    def test_what_cannot_be_trusted_is_refused(self, tmp_path, change, says):
        self.trained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        model = vit()
        with pytest.raises(fa.InputError, match=says):
            fa.load_peft(model, tmp_path)
        assert not lora_layers(model)

    def test_another_backbone_is_refused_by_layer(self, tmp_path):
        self.trained(tmp_path)
        for name, says in [
            ("test_vit2", r"targets 'blocks\.\d\.\w+\.\w+'.*no weights"),  # more blocks
            ("vit_tiny_patch16_224", r"blocks\.0\.\S+ has shape .* expects"),
            ("test_resnet", "does not have"),
        ]:
            model = timm.create_model(name, num_classes=0)
            with pytest.raises(fa.InputError, match=says):
                fa.load_peft(model, tmp_path)
            assert not lora_layers(model)
