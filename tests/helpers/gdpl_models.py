"""Make small random CLIP models and a tokenizer for them."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fastadapt.gdpl import GDPLSource

CONTEXT = 16
START, END = 98, 99


def clip_model(vision_layers=4, text_layers=3, custom_text=False, batch_first=True, **options):
    open_clip = pytest.importorskip("open_clip")
    vision = {
        "layers": vision_layers,
        "width": 32,
        "patch_size": 8,
        "image_size": 16,
        "head_width": 16,
    }
    text = {"context_length": CONTEXT, "vocab_size": 100, "width": 16, "heads": 2}
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.CLIP
    model = kind(
        embed_dim=12, vision_cfg=vision, text_cfg={**text, "layers": text_layers, **options}
    )
    for tower in (model.visual, getattr(model, "text", model)):
        tower.transformer.batch_first = batch_first
        for block in tower.transformer.resblocks:
            block.attn.batch_first = batch_first
            # open_clip starts with biases of zero: give them a part in what is compared.
            torch.nn.init.normal_(block.attn.in_proj_bias, std=0.3)
            torch.nn.init.normal_(block.attn.out_proj.bias, std=0.3)
    return model.eval()


class WordTokenizer:
    """Give one token per word and per full stop, and truncate long texts as open_clip does."""

    def __init__(self):
        self.words = {}

    def __call__(self, texts, context_length=CONTEXT):
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            words = text.lower().replace(".", " .").split()
            ids = [self.words.setdefault(word, 1 + len(self.words)) for word in words]
            ids = [START, *ids, END][:context_length]
            row[: len(ids)] = torch.tensor(ids)
            row[len(ids) - 1] = END
        return rows


def tiny_config(layers):
    """Return a CLIP model's settings, with the vocabulary of open_clip's own tokenizer."""
    vision = {"layers": layers, "width": 32, "patch_size": 8, "image_size": 16, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": layers}
    return {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}


def tiny_clip(layers):
    """Make a random CLIP model of :func:`tiny_config`."""
    return pytest.importorskip("open_clip").CLIP(**tiny_config(layers)).eval()


def save_source(folder, layers=2):
    """Save a random CLIP model and a random domain encoder as files, for training by name."""
    config = tiny_config(layers)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(tiny_clip(layers).state_dict(), folder / "open_clip_model.safetensors")
    encoder = timm.create_model("test_efficientnet", num_classes=0)
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    return GDPLSource(
        f"local-dir:{folder}",
        None,
        "test_efficientnet",
        str(folder / "encoder.safetensors"),
        domain_size=32,
    )


def make_colours(root, names, count=6, size=20):
    """Write class folders of noisy images, one colour per class."""
    rng = np.random.default_rng(0)
    for name in names:
        colour = rng.integers(0, 256, 3)
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.clip(colour + rng.normal(0, 20, (size, size, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root
