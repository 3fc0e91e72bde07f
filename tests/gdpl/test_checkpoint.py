"""Tests of GDPL checkpoints: activation, damaged configurations, files of two saves."""

import json

import pytest
import torch

import fastadapt as fa
from fastadapt.files import seal
from fastadapt.gdpl import GDPLConfig, GDPLModel, GDPLSource, load_gdpl, save_gdpl
from fastadapt.gdpl import checkpoint as gdpl_checkpoint
from tests.helpers.gdpl_models import WordTokenizer, clip_model, tiny_clip

WIDTH = 7
SMALL = GDPLConfig(n_ctx=2, depth=3, rank=2, rank_depth=2, hidden=5)


def gdpl(clip):
    return GDPLModel(clip, WIDTH, ["forest", "river"], SMALL, tokenizer=WordTokenizer())


def edit(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    config = json.loads(json.dumps({k: v for k, v in config.items() if v is not ...}, default=str))
    file.write_text(json.dumps(seal(config)))


def with_quick_gelu(clip):
    open_clip = pytest.importorskip("open_clip")
    for tower in (clip.visual, clip):
        for block in tower.transformer.resblocks:
            block.mlp.gelu = open_clip.transformer.QuickGELU()
    return clip


class TestActivation:
    def test_another_one_is_refused(self, tmp_path):
        clip = clip_model()
        save_gdpl(gdpl(clip), tmp_path)
        assert load_gdpl(tmp_path, clip, tokenizer=WordTokenizer())
        with pytest.raises(fa.InputError, match="with GELU; this one computes QuickGELU"):
            load_gdpl(tmp_path, with_quick_gelu(clip), tokenizer=WordTokenizer())

    @pytest.mark.parametrize("old", [True, False])
    def test_older_runs_get_the_one_that_they_were_trained_with(self, tmp_path, monkeypatch, old):
        clip, asked = tiny_clip(layers=3), []

        def create_clip(name, weights, *, quick_gelu):
            asked.append(quick_gelu)
            return clip, pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()

        monkeypatch.setattr(gdpl_checkpoint, "create_clip", create_clip)
        source = GDPLSource("ViT-B-16", "openai", WIDTH)
        save_gdpl(source.create(["forest", "river"], SMALL), tmp_path, source)
        if old:
            config = json.loads((tmp_path / "config.json").read_text())
            del config["clip_activation"], config["weights_sha256"], config["content_sha256"]
            config["version"] = 1
            (tmp_path / "config.json").write_text(json.dumps(config))
        load_gdpl(tmp_path)
        assert asked == [None, False if old else None]


def test_weights_of_another_save(tmp_path):
    clip = clip_model()
    save_gdpl(gdpl(clip), tmp_path / "one")
    save_gdpl(gdpl(clip), tmp_path / "two")
    (tmp_path / "two" / "adapter.safetensors").replace(tmp_path / "one" / "adapter.safetensors")
    with pytest.raises(fa.InputError, match="was not written with"):
        load_gdpl(tmp_path / "one", clip, tokenizer=WordTokenizer())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"feature_dim": 10**12}, "linear1.weight has shape"),
        ({"feature_dim": "7"}, "feature_dim is '7'"),
        ({"gdpl": {**SMALL.to_dict(), "n_ctx": 4000}}, "ctx has shape"),
        ({"gdpl": {**SMALL.to_dict(), "depth": 4000}}, "deep_ctx has shape"),
        ({"gdpl": {**SMALL.to_dict(), "hidden": 900_000}}, "linear1.weight has shape"),
        ({"gdpl": {**SMALL.to_dict(), "rank": 60_000}}, "in_proj_A has shape"),
        ({"gdpl": {**SMALL.to_dict(), "rank": "4"}}, "rank is '4'"),
        ({"class_names": {"a": 1}}, "class_names"),
        ({"fingerprints": []}, "fingerprints"),
    ],
    ids=str,
)
def test_every_value_is_typed_and_bounded(tmp_path, change, says):
    clip = clip_model()
    save_gdpl(gdpl(clip), tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(fa.InputError, match=says):
        load_gdpl(tmp_path, clip, tokenizer=WordTokenizer())


def test_saved_names_survive(tmp_path):
    clip = clip_model()
    model = gdpl(clip).eval()
    save_gdpl(model, tmp_path)
    x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
    assert torch.equal(load_gdpl(tmp_path, clip, tokenizer=WordTokenizer())(x, f), model(x, f))
