"""Tests of upstream's checkpoints that carry the CLIP model they were trained on."""

import warnings

import pytest
import torch

import fastadapt as fa
from fastadapt.gdpl import GDPLConfig, GDPLModel, load_upstream
from tests.helpers.gdpl_models import WordTokenizer, clip_model
from tests.helpers.upstream_gdpl import upstream_state

WIDTH = 7
SMALL = GDPLConfig(n_ctx=2, depth=3, rank=2, alpha=3.0, rank_depth=2, hidden=5)


def gdpl(clip):
    names = ["forest", "river"]
    return GDPLModel(clip, WIDTH, names, SMALL, tokenizer=WordTokenizer())


def checkpoint(clip, dtype=torch.float32, merged=False):
    """What upstream's trainer saves: what it trained, and all of its CLIP model."""
    state = upstream_state(clip, WIDTH, 2, 3, 2, 2, 5)
    towers = {"image_encoder": clip.visual.state_dict()}
    parts = ("transformer.", "positional_embedding", "ln_final.", "text_projection")
    towers["text_encoder"] = {k: v for k, v in clip.state_dict().items() if k.startswith(parts)}
    for tower, tensors in towers.items():
        for name, tensor in tensors.items():
            tensor = tensor.detach().clone().to(dtype)
            if merged and name.endswith("in_proj_weight"):
                tensor += 0.5
            state[f"{tower}.{name}"] = tensor
    return {**state, "logit_scale": clip.logit_scale.detach()}


class TestTheCheckpointsClip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("custom_text", [False, True])
    def test_the_same_model_is_taken(self, dtype, merged, custom_text):
        clip = clip_model(custom_text=custom_text)
        source = clip if not custom_text else clip_model()
        state = checkpoint(source, dtype, merged)
        if custom_text:
            text = {f"text_encoder.{k}": v.to(dtype) for k, v in clip.text.state_dict().items()}
            image = {f"image_encoder.{k}": v for k, v in clip.visual.state_dict().items()}
            state = {k: v for k, v in state.items() if "_encoder." not in k or "lora_" in k}
            state |= text | image
        with pytest.warns(UserWarning, match="trained with QuickGELU"):
            load_upstream(gdpl(clip), state)

    @pytest.mark.parametrize(
        "key",
        [
            "image_encoder.conv1.weight",
            "image_encoder.transformer.resblocks.3.mlp.c_fc.weight",
            "text_encoder.positional_embedding",
            "text_encoder.ln_final.bias",
        ],
    )
    def test_another_model_is_refused_and_nothing_loaded(self, key):
        clip = clip_model()
        state = checkpoint(clip)
        state[key] = state[key] + 0.01 * torch.randn_like(state[key])
        model = gdpl(clip)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(fa.InputError, match=f"another CLIP model: its {key} differs"):
            load_upstream(model, {"state_dict": state, "epoch": 3})
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_other_sizes_and_depths(self):
        with pytest.raises(fa.InputError, match=r"resblocks\.3\S+ is not in this CLIP model"):
            load_upstream(gdpl(clip_model(vision_layers=3)), shallow())
        clip = clip_model()
        state = checkpoint(clip)
        state["image_encoder.positional_embedding"] = torch.zeros(17, 32)
        with pytest.raises(fa.InputError, match=r"has shape \(17, 32\); this CLIP model has"):
            load_upstream(gdpl(clip), state)

    def test_without_clip_s_weights_there_is_nothing_to_compare(self):
        clip = clip_model()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_upstream(gdpl(clip), upstream_state(clip, WIDTH, 2, 3, 2, 2, 5))


def shallow():
    """A checkpoint of a deeper model whose first layers are those of ``clip_model``."""
    state = checkpoint(clip_model())
    last = {k: v for k, v in state.items() if "resblocks.3." in k and "image_encoder" in k}
    return {k: v for k, v in state.items() if "_encoder." not in k or "lora_" in k} | last
