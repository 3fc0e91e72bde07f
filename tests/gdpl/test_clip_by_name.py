"""Tests of the activation that CLIP models made by name compute."""

import pytest
import torch

import fastadapt as fa
from fastadapt.gdpl.clip import activation
from fastadapt.gdpl.clip_by_name import create_clip, trained_with_quick_gelu
from tests.helpers.gdpl_models import tiny_config

open_clip = pytest.importorskip("open_clip")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A small model under the names of ViT-B-16, whose weights are a file under OpenAI's tag."""
    config = tiny_config(layers=2)
    for name, quick in (("ViT-B-16", {}), ("ViT-B-16-quickgelu", {"quick_gelu": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**config, **quick})
    file = tmp_path / "weights.pt"
    torch.save(open_clip.CLIP(**config).state_dict(), file)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
    return file


class TestActivation:
    @pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-quickgelu"])
    def test_openai_s_weights_get_theirs(self, tiny, name, recwarn):
        clip, _ = create_clip(name, "openai")
        assert activation(clip) == "QuickGELU"
        assert type(clip.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
        assert not [w for w in recwarn if "QuickGELU" in str(w.message)]

    def test_others_keep_gelu(self, tiny):
        assert activation(create_clip("ViT-B-16", "laion2b_s34b_b88k")[0]) == "GELU"

    def test_files_have_what_the_name_says(self, tiny):
        assert activation(create_clip("ViT-B-16", str(tiny))[0]) == "GELU"
        assert activation(create_clip("ViT-B-16-quickgelu", str(tiny))[0]) == "QuickGELU"

    def test_openai_s_own_files_are_known(self, tmp_path):
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "ViT-B-16.pt")
        assert trained_with_quick_gelu("ViT-B-16", str(tmp_path / "ViT-B-16.pt")) is True

    def test_as_older_versions_made_it(self, tiny):
        assert activation(create_clip("ViT-B-16", "openai", quick_gelu=False)[0]) == "GELU"

    def test_weights_of_gelu_are_refused_under_the_other_name(self, monkeypatch):
        name = "ViT-B-16-quickgelu"
        tags = {**open_clip.pretrained._PRETRAINED[name], "other": {"url": "x"}}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
        with pytest.raises(fa.InputError, match=r"other were trained with GELU: give ViT-B-16$"):
            create_clip(name, "other")


def test_every_tag_of_open_clip_has_the_activation_that_it_states():
    for name, tag in open_clip.list_pretrained():
        stated = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        try:
            assert trained_with_quick_gelu(name, tag) == stated
        except fa.InputError:
            assert open_clip.get_model_config(name)["quick_gelu"] and not stated
