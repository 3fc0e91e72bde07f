import copy
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import fastadapt as fa
from fastadapt.config import AdaptConfig
from fastadapt.data.preprocess import Preprocess
from fastadapt.lora import lora_layers, remove_lora

SMALL = {"rank": 8, "num_centers": 3, "mlp_ratio": 0.5}

# name -> (timm arguments, layout, prefix tokens); the sizes keep one forward under a second
TIMM = {
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 2}, "tokens", 1),
    "deit3_small_patch16_224": ({"img_size": 64, "depth": 2}, "tokens", 1),
    "deit_tiny_distilled_patch16_224": ({"img_size": 64, "depth": 2}, "tokens", 2),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 56, "depth": 2}, "tokens", 5),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 2}, "tokens", 1),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "depths": (1, 1), "window_size": 4},
        "channels_last",
        0,
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, "channels_first", 0),
    "tf_efficientnet_lite0": ({}, "channels_first", 0),
    "resnet18": ({}, "channels_first", 0),
    "mobilenetv3_small_050": ({}, "channels_first", 0),
}


def small_timm(name):
    kwargs, *_ = TIMM[name]
    return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)


def vit(**kwargs):
    return timm.create_model("test_vit", pretrained=False, num_classes=0, **kwargs)


def clip_tower(timm_trunk=False):
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 32, "patch_size": 8, "image_size": 32, "head_width": 16}
    if timm_trunk:
        vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": ""}
        vision |= {"timm_proj": "linear", "image_size": 160}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


class TestBackbones:
    @pytest.mark.parametrize("name", TIMM)
    def test_timm_models(self, name):
        _, layout, prefix = TIMM[name]
        backbone = small_timm(name)
        size = (3, 64, 64) if layout == "channels_first" else None
        model = fa.adapt(backbone, AdaptConfig(**SMALL, input_size=size), 3)
        assert model.spec.layout == layout
        assert model.spec.num_prefix_tokens == prefix
        x = torch.randn(2, *model.spec.input_size)
        features = model.backbone_features(x)
        raw = backbone.forward_features(x)
        torch.testing.assert_close(features, raw[:, prefix:] if prefix else raw)
        assert model.forward_features(x).shape == features.shape
        tokens = features.numel() // 2 // model.spec.dim
        assert model.spec.num_tokens == tokens
        logits = model(x)
        assert logits.shape == (2, 3)
        logits.sum().backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        assert all(p.grad is not None for p in model.adapter.parameters())

    def test_open_clip_tower_and_whole_model(self):
        clip = clip_tower()
        x = torch.randn(2, 3, 32, 32)
        clip.visual.output_tokens = True
        _, tokens = clip.eval().visual(x)
        for given in (clip, clip.visual):
            model = fa.adapt(given, AdaptConfig(**SMALL), 3)
            assert model.spec.num_tokens == 16
            torch.testing.assert_close(model.backbone_features(x), tokens)
        assert model.pretrained_cfg["input_size"] == (3, 32, 32)

    @pytest.mark.parametrize(
        ("mode", "interpolation", "crop_mode"),
        [
            ("squash", "bilinear", "squash"),
            ("shortest", "bicubic", "center"),
            ("longest", "bicubic", "border"),
        ],
    )
    @pytest.mark.parametrize("timm_trunk", [True, False])
    def test_open_clip_s_preprocessing(self, mode, interpolation, crop_mode, timm_trunk):
        clip = clip_tower(timm_trunk)
        given = {"resize_mode": mode, "interpolation": interpolation, "mean": (0.5, 0.4, 0.3)}
        open_clip = pytest.importorskip("open_clip")
        open_clip.model.set_model_preprocess_cfg(clip, {**given, "std": (0.5, 0.6, 0.7)})
        for each in (clip, clip.visual):
            config = fa.adapt(each, AdaptConfig(**SMALL), 2).pretrained_cfg
            ours = Preprocess.from_pretrained_cfg(config)
            assert (ours.crop_mode, ours.interpolation) == (crop_mode, interpolation)
            assert ours.mean == (0.5, 0.4, 0.3) and ours.std == (0.5, 0.6, 0.7)
            assert ours.crop_pct == 1.0

    def test_squashed_images_equal_open_clip_s(self):
        open_clip = pytest.importorskip("open_clip")
        from open_clip.transform import PreprocessCfg, image_transform_v2

        clip = clip_tower()
        given = {
            "resize_mode": "squash",
            "interpolation": "bicubic",
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        }
        open_clip.model.set_model_preprocess_cfg(clip, given)
        theirs = image_transform_v2(PreprocessCfg(size=32, **given), is_train=False)
        ours = Preprocess.from_pretrained_cfg(
            fa.adapt(clip, AdaptConfig(adapter="none"), 2).pretrained_cfg
        )
        pixels = np.random.default_rng(0).integers(0, 255, (30, 60, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((96, 64))
        got = ours.normalize(ours.transform(image)[None])[0]
        torch.testing.assert_close(got, theirs(image), rtol=0, atol=0.02)  # a level of uint8

    @pytest.mark.parametrize(
        ("name", "prefix", "tokens"),
        [("volo_d1_224", 1, 196), ("coat_lite_tiny", 1, 49), ("cait_xxs24_224", 1, 196)],
    )
    def test_class_tokens_that_timm_does_not_count(self, name, prefix, tokens):
        backbone = timm.create_model(name, num_classes=0).eval()
        model = fa.adapt(backbone, AdaptConfig(adapter="none"), 0).eval()
        assert (model.spec.num_prefix_tokens, model.spec.num_tokens) == (prefix, tokens)
        x = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(model(x), backbone.forward_features(x)[:, 1:].mean(1))

    @pytest.mark.parametrize("name", ["pit_ti_224", "pit_ti_distilled_224"])
    def test_class_tokens_alone_are_refused(self, name):
        with pytest.raises(fa.InputError, match=r"PoolingVisionTransformer.*class tokens alone"):
            fa.adapt(timm.create_model(name, num_classes=0), AdaptConfig(adapter="none"), 2)

    def test_class_tokens_whose_number_nobody_knows(self):
        class Odd(nn.Module):
            def __init__(self, tokens):
                super().__init__()
                self.class_token, self.tokens = nn.Parameter(torch.zeros(1, 4, 8)), tokens

            def forward(self, x):
                return self.class_token.new_zeros(len(x), self.tokens, 8) + self.class_token.sum()

        config = {"input_size": (3, 64, 32), "adapter": "none"}
        assert fa.adapt(Odd(12), AdaptConfig(**config), 2).spec.num_prefix_tokens == 4
        assert fa.adapt(Odd(8), AdaptConfig(**config), 2).spec.num_prefix_tokens == 0
        with pytest.raises(fa.InputError, match=r"how many of its 23 tokens.*num_prefix_tokens"):
            fa.adapt(Odd(23), AdaptConfig(**config), 2)
        assert (
            fa.adapt(Odd(23), AdaptConfig(**config, num_prefix_tokens=1), 2).spec.num_tokens == 22
        )

    def test_models_in_a_folder(self, tmp_path, monkeypatch):
        from timm.models import save_for_hf

        monkeypatch.chdir(tmp_path)
        saved = timm.create_model("test_vit", num_classes=4).eval()
        save_for_hf(saved, "folder")
        model = fa.adapt("local-dir:folder", AdaptConfig(**SMALL), 2).eval()
        x = torch.randn(1, *model.spec.input_size)
        torch.testing.assert_close(model.backbone.forward_features(x), saved.forward_features(x))
        fa.save_adapter(model, "run")
        assert torch.equal(fa.load_adapter("run")(x), model(x))
        with pytest.raises(fa.InputError, match="nowhere"):
            fa.adapt("local-dir:nowhere", AdaptConfig(**SMALL), 2)

    def test_video_backbone(self):
        models = pytest.importorskip("torchvision.models.video")
        video = models.r3d_18(weights=None)
        trunk = nn.Sequential(*list(video.children())[:-2])
        model = fa.adapt(trunk, AdaptConfig(**SMALL, input_size=(3, 4, 32, 32)), 2)
        assert model.spec.layout == "channels_first"
        assert model(torch.randn(2, 3, 4, 32, 32)).shape == (2, 2)
        assert model.forward_features(torch.randn(1, 3, 4, 32, 32)).dim() == 5

    def test_any_module_with_a_feature_function(self):
        module = nn.Sequential(nn.Conv2d(1, 6, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))
        config = AdaptConfig(**SMALL, input_size=(1, 16, 16), features=lambda m, x: m[1](m[0](x)))
        assert fa.adapt(module, config, 2)(torch.randn(3, 1, 16, 16)).shape == (3, 2)

    def test_layout_that_the_shape_does_not_tell(self):
        module = nn.Conv2d(3, 4, 4, 4)  # [4, 4, 4]: channels, height and width look alike
        with pytest.raises(fa.InputError, match="channels_first"):
            fa.adapt(module, AdaptConfig(**SMALL, input_size=(3, 16, 16)), 2)
        config = AdaptConfig(**SMALL, input_size=(3, 16, 16), layout="channels_first")
        assert fa.adapt(module, config, 2).spec.dim == 4

    @pytest.mark.parametrize(
        ("backbone", "config", "says"),
        [
            ("vit_base_patch61_224", {}, "vit_base_patch16_224"),
            (42, {}, "expected a timm name"),
            (nn.Conv2d(3, 4, 3), {}, "input_size"),
            (nn.Conv2d(3, 4, 3), {"input_size": (1, 16, 16)}, "does not take an input"),
            (nn.Flatten(), {"input_size": (3, 8, 8)}, r"shape \(1, 192\).*features"),
            (nn.Conv2d(3, 4, 3), {"input_size": (3, 8, 8), "features": "tokens"}, "no such method"),
            (nn.Conv2d(3, 4, 3), {"input_size": (3, 8, 8), "layout": "tokens"}, "does not fit"),
        ],
    )
    def test_bad_backbones_are_explained(self, backbone, config, says):
        with pytest.raises(fa.InputError, match=says):
            fa.adapt(backbone, AdaptConfig(**config), 2, pretrained=False)

    def test_weights_of_another_model_name_the_key_and_both_shapes(self, tmp_path, brief_search):
        file = tmp_path / "weights.pth"
        torch.save(timm.create_model("test_vit2").state_dict(), file)
        with pytest.raises(fa.InputError, match=r"lacks 1 tensor \(cls_token\); holds 41"):
            fa.adapt("test_vit", None, 2, weights=str(file))
        state = timm.create_model("test_vit").state_dict()
        state["patch_embed.proj.weight"] = torch.zeros(1, 2, 3)
        torch.save({"state_dict": state}, file)
        with pytest.raises(fa.InputError, match=r"patch_embed.proj.weight has shape \(1, 2, 3\)"):
            fa.adapt("test_vit", None, 2, weights=str(file))


class TestFreezing:
    def test_batch_norms_and_dropout_stay_in_eval_after_train(self):
        model = fa.adapt(
            timm.create_model("test_resnet", drop_path_rate=0.5), AdaptConfig(**SMALL), 2
        )
        before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
        model.train()
        assert model.adapter.training and model.head.training
        assert not any(m.training for m in model.backbone.modules())
        model(torch.randn(2, *model.spec.input_size))
        after = model.backbone.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())

    def test_no_graph_is_kept_of_a_frozen_backbone(self):
        model = fa.adapt(vit(), AdaptConfig(**SMALL), 2).train()
        features = model.backbone_features(torch.randn(1, *model.spec.input_size))
        assert features.grad_fn is None and not features.requires_grad

    def test_stage_two_trains_everything(self):
        backbone = timm.create_model("test_resnet", num_classes=0)
        model = fa.adapt(backbone, AdaptConfig(**SMALL), 2).train().unfreeze()
        assert all(p.requires_grad for p in model.parameters())
        assert all(m.training for m in model.backbone.modules())
        model(torch.randn(2, *model.spec.input_size)).sum().backward()
        assert next(model.backbone.parameters()).grad is not None
        assert not any(p.requires_grad for p in model.freeze().backbone.parameters())

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_vit3"])
    def test_stage_two_leaves_out_what_the_features_do_not_use(self, name):
        model = fa.adapt(timm.create_model(name), AdaptConfig(**SMALL), 2).train().unfreeze()
        trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
        model(torch.randn(2, *model.spec.input_size)).square().sum().backward()
        assert trained == {n for n, p in model.backbone.named_parameters() if p.grad is not None}
        classifier = model.backbone.get_classifier()
        assert trained and not any(p.requires_grad for p in classifier.parameters())

    def test_stage_two_of_a_clip_tower_leaves_its_projection_alone(self):
        model = fa.adapt(clip_tower(), AdaptConfig(**SMALL), 2).unfreeze()
        frozen = {n for n, p in model.backbone.named_parameters() if not p.requires_grad}
        assert frozen == {"proj"}

    def test_features_without_gradients_cannot_be_unfrozen(self):
        config = AdaptConfig(
            **SMALL, input_size=(3, 16, 16), features=torch.no_grad()(lambda m, x: m(x))
        )
        model = fa.adapt(nn.Conv2d(3, 8, 4, 4), config, 2)
        with pytest.raises(fa.InputError, match="carry no gradients"):
            model.unfreeze()

    def test_parameters_unfrozen_one_by_one_get_gradients(self):
        model = fa.adapt(vit(), AdaptConfig(**SMALL), 2).train()
        last = model.backbone.blocks[-1].requires_grad_(True)
        model(torch.randn(1, *model.spec.input_size)).sum().backward()
        assert all(p.grad is not None for p in last.parameters())
        assert not last.training


class TestLastBlocks:
    # name -> blocks, prefixes of what trains with last=1
    MODELS: ClassVar = {
        "test_vit": (6, ("blocks.5.", "norm.")),
        "test_resnet": (4, ("layer4.0.",)),
        "test_convnext": (None, ("stages.3.blocks.1.", "head.norm.")),
        "test_efficientnet": (5, ("blocks.4.", "conv_head.", "bn2.")),
    }

    @pytest.mark.parametrize("name", MODELS)
    def test_of_timm_models(self, name):
        count, prefixes = self.MODELS[name]
        model = fa.adapt(timm.create_model(name), AdaptConfig(**SMALL), 2).train().unfreeze(last=1)
        trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
        assert trained and all(n.startswith(prefixes) for n in trained)
        assert all(any(n.startswith(prefix) for n in trained) for prefix in prefixes[:1])
        model(torch.randn(2, *model.spec.input_size)).square().sum().backward()
        assert trained == {n for n, p in model.backbone.named_parameters() if p.grad is not None}
        assert not model.frozen and not model.backbone_trained
        if count is not None:
            with pytest.raises(fa.InputError, match=rf"last is {count + 1}; .* has {count} blocks"):
                model.unfreeze(last=count + 1)

    def test_batch_norms_of_other_blocks_keep_their_statistics(self):
        model = fa.adapt(timm.create_model("test_resnet"), AdaptConfig(**SMALL), 2).train()
        model.unfreeze(last=1)
        before = {n: b.clone() for n, b in model.backbone.named_buffers()}
        model(torch.randn(2, *model.spec.input_size))
        changed = {n for n, b in model.backbone.named_buffers() if not torch.equal(b, before[n])}
        assert changed and all(n.startswith("layer4.0.") for n in changed)
        model.freeze()
        assert not any(p.requires_grad for p in model.backbone.parameters())
        assert not any(m.training for m in model.backbone.modules())

    def test_of_clip_towers_and_other_modules(self):
        model = fa.adapt(clip_tower(), AdaptConfig(**SMALL), 2).unfreeze(last=1)
        trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
        assert {n.rpartition("resblocks.")[2][:2] for n in trained if "resblocks" in n} == {"1."}
        assert {"ln_post.weight", "ln_post.bias"} <= trained
        block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        module = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Sequential(block, copy.deepcopy(block)))
        config = AdaptConfig(**SMALL, input_size=(3, 32, 32), layout="channels_first")
        model = fa.adapt(module, config, 2).unfreeze(last=1)
        trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
        assert trained == {"1.1.0.weight", "1.1.0.bias"}

    def test_unknown_blocks_and_impossible_counts(self):
        config = AdaptConfig(**SMALL, input_size=(3, 16, 16))
        model = fa.adapt(nn.Conv2d(3, 8, 4, 4), config, 2)
        with pytest.raises(fa.InputError, match="blocks of Conv2d are not known"):
            model.unfreeze(last=1)
        with pytest.raises(fa.InputError, match="last is 0"):
            model.unfreeze(last=0)


class TestASecondModelOnOneBackbone:
    LORA = fa.LoRAConfig(r=2)

    @pytest.mark.parametrize("lora", [None, LORA])
    def test_low_rank_weights_of_the_first_are_refused_by_name(self, lora):
        backbone = vit()
        fa.adapt(backbone, AdaptConfig(**SMALL, lora=self.LORA), 2)
        with pytest.raises(fa.InputError, match=r"low-rank adapters of another.*blocks\.0\.attn"):
            fa.adapt(backbone, AdaptConfig(**SMALL, lora=lora), 2)
        with pytest.raises(fa.InputError, match="low-rank adapters of another"):
            fa.adapt(copy.deepcopy(backbone), AdaptConfig(**SMALL), 2)

    def test_without_them_it_starts_from_the_pretrained_features(self):
        backbone, x = vit().eval(), torch.randn(1, 3, 160, 160)
        before = backbone.forward_features(x)
        first = fa.adapt(backbone, AdaptConfig(**SMALL, lora=self.LORA), 2)
        for layer in lora_layers(first.backbone).values():
            nn.init.normal_(layer.lora_B["all"])
        assert not torch.equal(backbone.forward_features(x), before)
        names = remove_lora(backbone)
        assert len(names) == len(backbone.blocks)
        second = fa.adapt(backbone, AdaptConfig(**SMALL), 2).eval()
        assert torch.equal(second.backbone.forward_features(x), before)
        assert not any("lora" in name for name, _ in second.named_parameters())

    def test_nothing_is_left_of_an_attempt_that_failed(self):
        backbone = vit()
        with pytest.raises(fa.InputError, match="match no linear layer"):
            fa.adapt(backbone, AdaptConfig(**SMALL, lora=fa.LoRAConfig(targets=("x",))), 2)
        assert fa.adapt(backbone, AdaptConfig(**SMALL, lora=self.LORA), 2).frozen


class TestTimmInterface:
    def test_forward_is_head_of_features(self):
        model = fa.adapt(vit(), AdaptConfig(**SMALL), 3).eval()
        x = torch.randn(2, *model.spec.input_size)
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean(1))
        assert pooled.shape == (2, model.num_features)

    def test_reset_classifier(self):
        model = fa.adapt(vit().double(), AdaptConfig(**SMALL), 3)
        model.reset_classifier(7)
        assert model.get_classifier().weight.shape == (7, model.num_features)
        assert model.get_classifier().weight.dtype == torch.float64
        assert model.num_classes == 7
        model.reset_classifier(0)
        x = torch.randn(2, *model.spec.input_size, dtype=torch.float64)
        assert model(x).shape == (2, model.num_features)
        with pytest.raises(ValueError, match="'token'"):
            model.reset_classifier(3, "token")

    def test_pretrained_cfg_serves_timm_s_data_functions(self):
        from timm.data import resolve_model_data_config

        model = fa.adapt(vit(), AdaptConfig(**SMALL), 3)
        config = resolve_model_data_config(model)
        assert config["input_size"] == model.spec.input_size
        assert len(config["mean"]) == 3

    def test_grad_checkpointing_changes_nothing_but_memory(self):
        model = fa.adapt(vit(), AdaptConfig(**SMALL), 3).train()
        x = torch.randn(2, *model.spec.input_size)
        model(x).sum().backward()
        want = [p.grad.clone() for p in model.adapter.parameters()]
        model.zero_grad()
        model.set_grad_checkpointing()
        assert model.backbone.grad_checkpointing
        model(x).sum().backward()
        for p, grad in zip(model.adapter.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, grad)

    def test_compiles_whole(self):
        model = fa.adapt(vit(), AdaptConfig(**SMALL), 3).eval()
        x = torch.randn(2, *model.spec.input_size)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))

    def test_token_mode_takes_its_size_from_the_backbone(self):
        model = fa.adapt(vit(), AdaptConfig(**SMALL, mode="token"), 3)
        n = model.spec.num_tokens
        assert model.adapter.blocks[0].attn.transforms.shape == (3, n, n)

    def test_no_adapter_is_a_linear_probe(self):
        model = fa.adapt(vit(), AdaptConfig(adapter="none"), 3)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trainable == ["head.weight", "head.bias"]


def test_settings_survive_json():
    config = AdaptConfig(depth=2, input_size=(3, 32, 32), lora=fa.LoRAConfig(r=4, parts="qv"))
    assert AdaptConfig.from_dict(config.to_dict()) == config
    with pytest.raises(fa.InputError, match="'colour'"):
        AdaptConfig.from_dict({"colour": 1})


@pytest.mark.parametrize(
    ("kwargs", "says"), [({"adapter": "lora"}, "'lora'"), ({"input_size": (32, 32)}, r"\(32, 32\)")]
)
def test_impossible_settings_are_refused(kwargs, says):
    with pytest.raises(fa.InputError, match=says):
        AdaptConfig(**kwargs)
