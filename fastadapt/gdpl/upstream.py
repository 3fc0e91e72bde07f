"""Convert checkpoints of the paper's code."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor

from fastadapt.errors import InputError
from fastadapt.gdpl.clip import activation, text_tower

# Saved by upstream and not needed here: frozen weights, the texts' embeddings, and a network that
# upstream never uses.
_FROZEN = re.compile(
    r"image_encoder\.|text_encoder\.|remote_model\.|medical_model\.|visual_net\.|logit_scale$"
    r"|prompt_learner\.token_(prefix|suffix)$"
)
_PROJECTION = re.compile(r"\.attn\.(in_proj_weight|out_proj\.weight)$")
_LAYER = re.compile(r"transformer\.resblocks\.\d+\.(ln_|mlp\.)")
_LEARNER = {
    "ctx": "ctx",
    "proj.weight": "proj.weight",
    "proj.bias": "proj.bias",
    **{
        f"meta_net.{layer}.{kind}": f"meta_net.{layer}.{kind}"
        for layer in ("linear1", "linear2")
        for kind in ("weight", "bias")
    },
}
_QUATERNION = ("r_weight", "i_weight", "j_weight", "k_weight", "bias")
_ATTENTION = {
    "in_proj_weight_lora_A": "in_proj_A",
    "in_proj_weight_lora_B": "in_proj_B",
    "in_proj_weight_lora_S": "in_proj_S",
    "out_proj.lora_A": "out_proj_A",
    "out_proj.lora_B": "out_proj_B",
}


def convert_gdpl_state_dict(upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the trained tensors from upstream's keys to those of :class:`GDPLModel`.

    Args:
        upstream: the state dict of upstream's ``CustomCLIP``, with or without ``module.``. Frozen
            weights in it are left out: they come with the CLIP model and the domain encoder.

    Returns:
        ``prompt_learner.*`` and ``low_rank.*``, on which ``load_state_dict(…, strict=False)``
        reports the frozen keys alone as missing.

    Raises:
        InputError: a part is missing, or a key is none of upstream's; it is named.

    Upstream's ``lora_relation`` gets no gradients there and stays zero, so its ``lora_S`` need no
    correction.
    """
    given = {key.removeprefix("module."): tensor for key, tensor in upstream.items()}
    used: set[str] = set()

    def take(key: str) -> Tensor:
        if key not in given:
            raise InputError(
                f"the checkpoint lacks {key!r}, a part of every GDPL checkpoint: was it trained "
                "with another method, or saved in part?"
            )
        used.add(key)
        return given[key]

    def count(pattern: str) -> int:
        return len({match[1] for key in given if (match := re.match(pattern, key))})

    result = {}
    for theirs, ours in _LEARNER.items():
        result[f"prompt_learner.{ours}"] = take(f"prompt_learner.{theirs}")
    for key in _QUATERNION:
        source = f"prompt_learner.visual_net_mq.{key}"
        result[f"prompt_learner.language_net.{key}"] = take(source)
    deep = count(r"prompt_learner\.compound_prompts_text\.(\d+)$")
    deep = max(deep, count(r"prompt_learner\.compound_prompt_projections\.(\d+)\."))
    texts = [take(f"prompt_learner.compound_prompts_text.{i}") for i in range(deep)]
    ctx = result["prompt_learner.ctx"]
    result["prompt_learner.deep_ctx"] = (
        torch.stack(texts) if texts else ctx.new_empty(0, *ctx.shape)
    )
    for key in _QUATERNION if deep else ():
        source = "prompt_learner.compound_prompt_projections"
        nets = [take(f"{source}.{i}.{key}") for i in range(deep)]
        result[f"prompt_learner.vision_nets.{key}"] = torch.stack(nets)

    branches = {"vision": "image_encoder", "text": "text_encoder"}
    pattern = r"(?:image|text)_encoder\.transformer\.resblocks\.(\d+)\.attn\.\S*lora_"
    layers = max(count(pattern), 1)
    for ours, theirs in branches.items():
        for source, target in _ATTENTION.items():
            blocks = f"{theirs}.transformer.resblocks"
            tensors = [take(f"{blocks}.{i}.attn.{source}") for i in range(layers)]
            result[f"low_rank.{ours}.{target}"] = torch.stack(tensors)
    result["low_rank.relation"] = take("lora_relation")

    for key in given:
        if key not in used and not _FROZEN.match(key):
            raise InputError(f"{key!r} is no key of an upstream GDPL checkpoint")
    return result


def compare_clip(clip: Any, upstream: dict[str, Tensor], where: str) -> None:
    """Check that a CLIP model has the weights that a checkpoint of upstream carries beside its own.

    Projections of the attention are left out, since upstream merges low-rank updates into them. A
    checkpoint that was stripped of its frozen weights is not compared.

    Args:
        clip: an open_clip model.
        upstream: the state dict of upstream's ``CustomCLIP``.
        where: names it in messages.

    Raises:
        InputError: a tensor has another shape or other values, or the model lacks its layer.
    """
    towers = {
        "image_encoder": clip.visual.state_dict(),
        "text_encoder": text_tower(clip).state_dict(),
    }
    compared = 0
    for key, theirs in upstream.items():
        tower, _, name = key.removeprefix("module.").partition(".")
        if tower not in towers or "lora_" in name or _PROJECTION.search(name):
            continue
        ours = towers[tower].get(name)
        if ours is None:
            if not _LAYER.match(name):
                continue  # a parameter of other versions that the model computes without
            problem = "is not in this CLIP model"
        elif ours.shape != theirs.shape:
            problem = f"has shape {tuple(theirs.shape)}; this CLIP model has {tuple(ours.shape)}"
        elif not _equal_but_rounded(ours, theirs):
            problem = "differs from this CLIP model's"
        else:
            compared += 1
            continue
        raise InputError(
            f"{where} was trained on another CLIP model: its {key} {problem}. Upstream trains on "
            "OpenAI's ViT-B/16, open_clip's ViT-B-16-quickgelu with the weights openai"
        )
    if compared and activation(clip) != "QuickGELU":
        warnings.warn(
            f"{where} was trained with QuickGELU, as all of upstream's CLIP models; this one "
            f"computes {activation(clip)}: make it with ViT-B-16-quickgelu",
            stacklevel=3,
        )


def _equal_but_rounded(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether two tensors are equal but for the rounding of their dtypes."""
    eps = max(torch.finfo(t.dtype).eps for t in (ours, theirs) if t.is_floating_point())
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    tiny = eps * theirs.abs().max().item()
    return torch.allclose(ours, theirs, rtol=2 * eps, atol=max(tiny, 1e-7))
