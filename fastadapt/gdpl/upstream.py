"""Convert checkpoints of the paper's code."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastadapt.errors import InputError

# Saved by upstream and not needed here: frozen weights, the texts' embeddings, and a network that
# upstream never uses.
_FROZEN = re.compile(
    r"image_encoder\.|text_encoder\.|remote_model\.|medical_model\.|visual_net\.|logit_scale$"
    r"|prompt_learner\.token_(prefix|suffix)$"
)
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
