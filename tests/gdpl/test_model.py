import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import fastadapt as fa
from fastadapt.gdpl import (
    DomainEncoder,
    GDPLConfig,
    GDPLModel,
    convert_gdpl_state_dict,
    load_upstream,
)
from tests.helpers.gdpl_models import CONTEXT, END, WordTokenizer, clip_model
from tests.helpers.upstream_gdpl import cross_entropy, upstream_logits, upstream_state

NAMES = ["annual crop land", "forest", "annual_crop field", "sea lake", "river"]
SMALL = GDPLConfig(n_ctx=2, depth=3, rank=2, alpha=3.0, rank_depth=2, hidden=5)
WIDTH = 7


def small_model(config=SMALL, names=NAMES, clip=None, encoder=WIDTH):
    return GDPLModel(clip or clip_model(), encoder, names, config, tokenizer=WordTokenizer())


def randomize(model):
    """Weights that start as zero or one get something to do."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(clip):
    """A model's parts where the restatement looks for them, whichever way it was built."""
    text = getattr(clip, "text", clip)
    names = ("transformer", "token_embedding", "positional_embedding", "ln_final")
    parts = {name: getattr(text, name) for name in (*names, "text_projection")}
    return SimpleNamespace(visual=clip.visual, logit_scale=clip.logit_scale, **parts)


def epoch_rate(epoch):
    return 0.5**epoch


class TestEqualsUpstream:
    """Logits and every gradient, in fp64, against the looped restatement."""

    @pytest.mark.parametrize(
        ("config", "clip"),
        [
            ({}, {}),
            ({"depth": 1, "rank_depth": 3}, {}),
            ({"n_ctx": 4}, {"vision_layers": 3, "text_layers": 5}),
            ({"n_ctx": 5, "class_chunk": 2}, {}),
            ({"class_chunk": 1, "rank": 3}, {"batch_first": False}),
            ({"noise": "always"}, {"custom_text": True}),
        ],
        ids=lambda d: "-".join(map(str, d)) or "default",
    )
    def test_logits_and_gradients(self, config, clip):
        config = GDPLConfig(**{**vars(SMALL), **config})
        clip = clip_model(**clip).double()
        model = small_model(config, clip=clip).double().train(config.noise == "always")
        state = upstream_state(
            flat(clip),
            WIDTH,
            config.n_ctx,
            config.depth,
            config.rank,
            config.rank_depth,
            config.hidden,
        )
        state = {key: tensor.requires_grad_() for key, tensor in state.items()}
        with torch.no_grad():
            converted = convert_gdpl_state_dict(state)
            missing, unexpected = model.load_state_dict(converted, strict=False)
        assert not unexpected and all(key.startswith("clip.") for key in missing)

        images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        features = torch.randn(3, WIDTH, dtype=torch.float64)
        labels = torch.tensor([1, 4, 0])
        prefix = "x " * config.n_ctx if config.n_ctx > 4 else "a photo of a "
        texts = [f"{prefix}{name.replace('_', ' ')}." for name in NAMES]
        tokens = model.tokenizer(texts)
        noise = None
        if config.noise == "always":
            torch.manual_seed(5)
            noise = torch.randn(3, 16, dtype=torch.float64)
        want = upstream_logits(flat(clip), state, images, features, tokens, config.alpha, noise)
        torch.manual_seed(5)
        got = model(images, features)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

        names = list(state)
        grads = torch.autograd.grad(cross_entropy(want, labels), list(state.values()))
        want_grads = convert_gdpl_state_dict(dict(zip(names, grads, strict=True)))
        cross_entropy(got, labels).backward()
        got_grads = {name: p.grad for name, p in trained(model).items()}
        assert got_grads.keys() == want_grads.keys()
        for name, grad in want_grads.items():
            if not grad.numel():  # deeper prompts at depth 1
                continue
            torch.testing.assert_close(got_grads[name], grad, rtol=1e-8, atol=1e-10, msg=name)
            assert grad.abs().max() > 1e-9, name

    @pytest.mark.parametrize("options", [{}, {"pool_type": "eos", "eos_id": END}], ids=str)
    def test_clip_s_own_words_give_clip_s_own_logits(self, options):
        clip = clip_model(**options)
        model = small_model(clip=clip).eval()
        texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
        images = torch.randn(2, 3, 16, 16)
        want, _ = clip.get_logits(images, model.tokenizer(texts))
        torch.testing.assert_close(model.zero_shot(images), want)

    def test_no_words_no_zero_shot(self):
        model = small_model(GDPLConfig(**{**vars(SMALL), "n_ctx": 5}))
        with pytest.raises(fa.InputError, match="no 5 words"):
            model.zero_shot(torch.randn(2, 3, 16, 16))


class TestClassTree:
    def test_shared_words_are_there_once(self):
        classes = small_model().classes
        (tree,) = classes.trees
        # <start> (a photo) of a, then "annual crop" shared, "land . <end>", "field . <end>", …
        assert tree.mask(torch.float32).shape == (3 + 2 + 3 + 3 + 3 + 4 + 3 + 2,) * 2
        assert len(tree.embeddings) == len(tree.mask(torch.float32)) - 2
        # The end of "a photo of a river." sees its 7 own tokens.
        assert (tree.mask(torch.float32)[tree.ends[4]] == 0).sum() == 8

    def test_the_prompt_starts_from_the_template_s_words(self):
        model = small_model()
        words = model.tokenizer(["a photo"])[0, 1:3]
        want = model.clip.token_embedding(words)
        assert torch.equal(model.prompt_learner.ctx, want)

    def test_a_template_with_few_words_gets_placeholders(self):
        model = small_model(GDPLConfig(**{**vars(SMALL), "template": "{} seen from above"}))
        assert model.classes.context is None
        assert "x" in model.tokenizer.words

    def test_open_clip_s_own_tokenizer(self):
        open_clip = pytest.importorskip("open_clip")
        text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
        vision = {"layers": 3, "width": 32, "patch_size": 8, "image_size": 16, "head_width": 16}
        clip = open_clip.CLIP(12, vision, text).eval()
        model = GDPLModel(clip, WIDTH, NAMES, SMALL).eval()
        assert model(torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)).shape == (2, 5)


class TestModel:
    def test_only_what_gdpl_adds_trains(self):
        model = small_model().train()
        assert all(n.startswith(("prompt_learner.", "low_rank.")) for n in trained(model))
        assert not any(m.training for m in model.clip.modules())
        assert model.prompt_learner.training
        model(torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)).sum().backward()
        assert all(p.grad is not None for p in trained(model).values())
        assert all(p.grad is None for p in model.clip.parameters())

    def test_noise_is_of_training_alone(self):
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH) + 3
        model = randomize(small_model())
        assert not torch.equal(model.train()(x, f), model(x, f))
        assert torch.equal(model.eval()(x, f), model(x, f))
        always = randomize(small_model(GDPLConfig(**{**vars(SMALL), "noise": "always"}))).eval()
        assert not torch.equal(always(x, f), always(x, f))

    def test_rows_do_not_depend_on_the_batch(self):
        x, f = torch.randn(4, 3, 16, 16), torch.randn(4, WIDTH)
        model = randomize(small_model()).eval()
        torch.testing.assert_close(model(x, f)[2:3], model(x[2:3], f[2:3]))

    def test_other_classes_without_training(self):
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
        model = randomize(small_model()).eval()
        all_logits = model(x, f)
        model.set_class_names(["river", "harbour", "forest"])
        logits = model(x, f)
        assert model.num_classes == 3
        torch.testing.assert_close(logits[:, [2, 0]], all_logits[:, [1, 4]])

    def test_domain_features_can_be_kept(self):
        encoder = DomainEncoder(nn.Conv2d(3, WIDTH, 8, 8), input_size=(3, 16, 16))
        model = randomize(small_model(encoder=encoder)).eval()
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(model(x), model(x, model.domain_features(x)))

    def test_grad_checkpointing_changes_nothing(self):
        model = randomize(small_model(GDPLConfig(**{**vars(SMALL), "noise": "off"}))).train()
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
        model(x, f).logsumexp(1).sum().backward()
        want = {n: p.grad.clone() for n, p in trained(model).items()}
        model.zero_grad()
        model.set_grad_checkpointing()
        model(x, f).logsumexp(1).sum().backward()
        for name, p in trained(model).items():
            torch.testing.assert_close(p.grad, want[name])

    def test_autocast_and_half_models(self):
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
        model = randomize(small_model()).eval()
        want = model(x, f)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x, f).float(), want, rtol=0.1, atol=0.5)
        half = model.bfloat16()
        got = half(x.bfloat16(), f.bfloat16())
        assert got.dtype == torch.float32  # logits of a half model are as exact as its features
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_frozen_weights_in_half_precision(self, dtype):
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
        model = randomize(small_model(GDPLConfig(**{**vars(SMALL), "noise": "off"}))).train()
        scale = model.clip.logit_scale.item()
        with torch.autocast("cpu", dtype):
            autocast = model(x, f)
        model.set_frozen_dtype(dtype)
        assert {p.dtype for p in trained(model).values()} == {torch.float32}
        assert model.clip.logit_scale.item() == scale
        assert model.clip.visual.conv1.weight.dtype == dtype
        with torch.autocast("cpu", dtype):
            got, zero_shot = model(x, f), model.zero_shot(x)
        assert got.dtype == zero_shot.dtype == torch.float32
        torch.testing.assert_close(got, autocast, rtol=0.1, atol=0.5)
        got.logsumexp(1).sum().backward()
        grads = [p.grad for p in trained(model).values()]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)

    def test_frozen_products_of_the_domain_encoder(self):
        vit = timm.create_model("test_vit", num_classes=0)
        model = small_model(encoder=DomainEncoder(vit))
        x = torch.randn(2, 3, 16, 16)
        with torch.autocast("cpu", torch.bfloat16):
            want = model.domain_features(x)
            got = model.set_frozen_dtype(torch.bfloat16).domain_features(x)
        assert vit.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert vit.blocks[0].norm1.weight.dtype == vit.pos_embed.dtype == torch.float32
        assert torch.equal(got, want)

    def test_logits_under_autocast_are_not_rounded_to_half(self):
        model = randomize(small_model()).eval()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.randn(8, 3, 16, 16), torch.randn(8, WIDTH))
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())

    def test_compiles_whole(self):
        model = randomize(small_model()).eval()
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, f), model(x, f))

    @pytest.mark.parametrize("half", [False, True])
    def test_a_training_step_compiles_whole(self, half):
        model = randomize(small_model(GDPLConfig(**{**vars(SMALL), "noise": "off"}))).train()
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
        if half:
            model.set_frozen_dtype(torch.bfloat16)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        grads = []
        for call in (model, compiled):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                call(x, f).logsumexp(1).sum().backward()
            grads.append({name: p.grad.clone() for name, p in trained(model).items()})
            model.zero_grad()
        for name, want in grads[0].items():
            torch.testing.assert_close(grads[1][name], want, rtol=1e-4, atol=1e-4, msg=name)


class TestDomainEncoder:
    def features(self, encoder, x):
        return encoder(x, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))

    def test_tokens_without_the_class_token(self):
        vit = timm.create_model("test_vit", num_classes=0)
        encoder = DomainEncoder(vit)
        x = torch.randn(2, 3, 160, 160)
        want = vit.eval().forward_features(x)[:, 1:].mean(1)
        torch.testing.assert_close(self.features(encoder, x), want)
        assert encoder.dim == 64 and not encoder.train().encoder.training

    def test_maps_vectors_and_resizing(self):
        conv = nn.Conv2d(3, 5, 4, 4)
        x = torch.randn(2, 3, 16, 16)
        encoder = DomainEncoder(conv, input_size=(3, 16, 16))
        torch.testing.assert_close(self.features(encoder, x), conv(x).mean((2, 3)))
        larger = DomainEncoder(conv, input_size=(3, 32, 32))
        assert self.features(larger, x).shape == (2, 5)
        vectors = DomainEncoder(nn.Sequential(conv, nn.Flatten()), input_size=(3, 16, 16))
        assert vectors.dim == 80 and self.features(vectors, x).shape == (2, 80)

    def test_mae_vits(self):
        """Tokens, the class token left out, from a model made for another size."""
        encoder = DomainEncoder(
            "vit_base_patch16_224.mae", pretrained=False, input_size=(3, 64, 64)
        )
        assert encoder.spec.num_prefix_tokens == 1 and encoder.spec.num_tokens == 16
        assert self.features(encoder, torch.randn(2, 3, 32, 32)).shape == (2, 768)

    def test_sam_encoders(self):
        """Maps [B, C, H/16, W/16] after a neck."""
        sam = timm.create_model(
            "samvit_base_patch16_224", depth=1, embed_dim=32, num_heads=2, neck_chans=24
        )
        encoder = DomainEncoder(sam)
        assert encoder.spec.layout == "channels_first" and encoder.dim == 24
        x = torch.randn(2, 3, 224, 224)
        want = sam.eval().forward_features(x).mean((2, 3))
        torch.testing.assert_close(self.features(encoder, x), want)
        model = randomize(small_model(encoder=encoder)).eval()
        assert model(torch.randn(2, 3, 16, 16)).isfinite().all()

    def test_own_normalisation(self):
        vit = timm.create_model("test_vit", num_classes=0)
        encoder = DomainEncoder(vit, normalization="own")
        mean, std = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.3)
        pixels = torch.rand(2, 3, 160, 160)
        config = vit.pretrained_cfg
        own = (pixels - torch.tensor(config["mean"]).view(-1, 1, 1)) / torch.tensor(
            config["std"]
        ).view(-1, 1, 1)
        got = encoder((pixels - mean) / std, mean, std)
        want = vit.eval().forward_features(own)[:, 1:].mean(1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_no_gradients(self):
        encoder = DomainEncoder(nn.Conv2d(3, 5, 4, 4), input_size=(3, 16, 16))
        assert not self.features(encoder, torch.randn(1, 3, 16, 16)).requires_grad
        assert not any(p.requires_grad for p in encoder.parameters())


class TestBadInput:
    @pytest.mark.parametrize(
        ("names", "says"),
        [
            ([], "class_names is empty"),
            (["forest", "river", "forest"], "'forest' and 'forest' are the same text"),
            (["sea lake", "sea_lake"], "'sea lake' and 'sea_lake' are the same"),
            ("forest", "'forest'; expected a list"),
            (["forest", " "], r"empty name: \['forest', ' '\]"),
            (["forest", " ".join(["very"] * 20)], rf"'very very.*context of {CONTEXT} tokens"),
        ],
    )
    def test_class_names(self, names, says):
        with pytest.raises(fa.InputError, match=says):
            small_model(names=names)

    def test_the_longest_name_that_fits(self):
        name = " ".join(["very"] * (CONTEXT - 7))
        model = small_model(names=["forest", name])
        assert model(torch.randn(1, 3, 16, 16), torch.randn(1, WIDTH)).shape == (1, 2)
        with pytest.raises(fa.InputError, match="too long"):
            model.set_class_names([name + " very"])
        assert model.class_names == ("forest", name)

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"depth": 4}, "depth is 4; the shallower branch .* has 3"),
            ({"rank_depth": 0}, "rank_depth is 0"),
            ({"n_ctx": 0}, "n_ctx is 0"),
            ({"rank": -1}, "rank is -1"),
            ({"noise": "eval"}, "noise is 'eval'"),
            ({"template": "a photo"}, "template is 'a photo'"),
            ({"class_chunk": 0}, "class_chunk is 0"),
        ],
    )
    def test_settings(self, config, says):
        with pytest.raises(fa.InputError, match=says):
            small_model(GDPLConfig(**{**vars(SMALL), **config}))

    def test_settings_of_another_version(self):
        assert GDPLConfig.from_dict(SMALL.to_dict()) == SMALL
        with pytest.raises(fa.InputError, match="'colour'"):
            GDPLConfig.from_dict({"colour": 1})

    def test_models_without_two_transformers(self):
        open_clip = pytest.importorskip("open_clip")
        with pytest.raises(fa.InputError, match="Linear without image and text branches"):
            small_model(clip=nn.Linear(2, 2))
        text = {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 3}
        vision = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}
        with pytest.raises(fa.InputError, match=r"vision branch .* ModifiedResNet"):
            small_model(clip=open_clip.CLIP(12, vision, text))
        with pytest.raises(fa.InputError, match="not purely causal"):
            small_model(clip=clip_model(custom_text=True, no_causal_mask=True))
        with pytest.raises(fa.InputError, match="pools by 'last'"):
            small_model(clip=clip_model(pool_type="last"))

    def test_a_tokenizer_of_another_model(self):
        pytest.importorskip("open_clip")
        with pytest.raises(fa.InputError, match=r"gives token 49407, but the model has 100"):
            GDPLModel(clip_model(), WIDTH, NAMES, SMALL)

    def test_a_domain_encoder_of_another_width(self):
        model = small_model()
        with pytest.raises(fa.InputError, match=r"shape \(2, 9\); expected \[B, 7\]"):
            model(torch.randn(2, 3, 16, 16), torch.randn(2, 9))
        with pytest.raises(fa.InputError, match="no domain encoder"):
            model(torch.randn(2, 3, 16, 16))

    def test_an_encoder_says_what_its_own_settings_are(self):
        with pytest.raises(fa.InputError, match=r"give DomainEncoder\(input_size="):
            DomainEncoder(nn.Conv2d(3, 5, 4, 4))
        with pytest.raises(fa.InputError, match=r"Give DomainEncoder\(layout="):
            DomainEncoder(nn.Conv2d(3, 4, 4, 4), input_size=(3, 16, 16))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"depth": 2}, r"deep_ctx has shape \(1, 2, 16\); the model expects \(2, 2, 16\)"),
            ({"rank": 3}, r"low_rank.* has shape"),
            ({"hidden": 4}, r"meta_net.linear1.* has shape"),
            ({"feature_dim": WIDTH + 1}, r"linear1.weight has shape \(5, 8\).* expects \(5, 7\)"),
        ],
        ids=str,
    )
    def test_upstream_checkpoints_of_other_settings(self, change, says):
        clip = clip_model()
        settings = {"feature_dim": WIDTH, "n_ctx": 2, "depth": 3, "rank": 2, "rank_depth": 2}
        state = upstream_state(clip, **{**settings, "hidden": 5, **change})
        with pytest.raises(fa.InputError, match=says):
            load_upstream(small_model(clip=clip), state)

    def test_an_upstream_file(self, tmp_path):
        clip = clip_model()
        state = upstream_state(clip, WIDTH, 2, 3, 2, 2, 5)
        # As upstream's trainer saves: dassl keeps optimizer and scheduler beside the weights.
        weights = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, epoch_rate)
        content = {
            "state_dict": state,
            "epoch": 2,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler,
            "val_result": None,
        }
        torch.save(content, tmp_path / "model.pth.tar-2")
        model = small_model(clip=clip)
        assert load_upstream(model, tmp_path / "model.pth.tar-2") is model
        for name, want in convert_gdpl_state_dict(state).items():
            assert torch.equal(model.get_parameter(name), want.float())
        with pytest.raises(fa.InputError, match=r"^the checkpoint: low_rank.* is unexpected"):
            load_upstream(small_model(replace(SMALL, rank=0), clip=clip), state)
        state["prompt_learner.ctx"][0] = torch.nan
        with pytest.raises(fa.InputError, match=r"prompt_learner\.ctx holds 16 values"):
            load_upstream(model, state)

    def test_checkpoints_with_a_missing_or_foreign_part(self):
        clip = clip_model()
        state = upstream_state(clip, WIDTH, 2, 3, 2, 2, 5)
        for key in state:
            part = {k: v for k, v in state.items() if k != key}
            with pytest.raises(fa.InputError, match=r"lacks 'prompt_learner|lacks '.*lora_"):
                convert_gdpl_state_dict(part)
        with pytest.raises(fa.InputError, match=r"'prompt_learner.sentinel' is no key"):
            convert_gdpl_state_dict({**state, "prompt_learner.sentinel": torch.zeros(1)})
        frozen = {
            "image_encoder.conv1.weight": torch.zeros(1),
            "remote_model.cls_token": torch.zeros(1),
            "visual_net.linear1.weight": torch.zeros(1),
            "prompt_learner.token_prefix": torch.zeros(1),
            "logit_scale": torch.zeros(1),
        }
        prefixed = {f"module.{key}": tensor for key, tensor in {**state, **frozen}.items()}
        assert convert_gdpl_state_dict(prefixed).keys() == convert_gdpl_state_dict(state).keys()


def test_the_package_imports_neither_open_clip_nor_timm():
    code = (
        "import sys, fastadapt as fa; fa.gdpl.GDPLModel; "
        "sys.exit(any(m in sys.modules for m in ('open_clip', 'timm')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
