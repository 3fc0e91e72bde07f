"""Adapt CLIP models by quaternion domain prompts and coupled low-rank updates (GDPL).

import fastadapt as fa
import open_clip

clip = open_clip.create_model("ViT-B-16", pretrained="laion2b_s34b_b88k")
model = fa.gdpl.GDPLModel(clip, "vit_base_patch16_224.mae", ["forest", "river", "harbour"])
logits = model(images)               # [B, 3]; only what GDPL adds has gradients

Source: "Promoting AI Equity in Science: Generalized Domain Prompt Learning for Accessible VLM
Research" (Cao et al.); upstream caoql98/GDPL.
"""

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fastadapt.gdpl.checkpoint import (
        GDPLSource,
        load_gdpl,
        load_upstream,
        save_gdpl,
    )
    from fastadapt.gdpl.clip_by_name import create_clip
    from fastadapt.gdpl.config import GDPLConfig, GDPLTrainConfig
    from fastadapt.gdpl.domain_encoder import DomainEncoder
    from fastadapt.gdpl.domain_features import FeatureTable
    from fastadapt.gdpl.low_rank import CoupledLowRank
    from fastadapt.gdpl.model import GDPLModel
    from fastadapt.gdpl.prompts import DomainPromptLearner, Prompts
    from fastadapt.gdpl.train import train_gdpl
    from fastadapt.gdpl.upstream import convert_gdpl_state_dict

_MODULES = {
    "CoupledLowRank": "low_rank",
    "DomainEncoder": "domain_encoder",
    "DomainPromptLearner": "prompts",
    "FeatureTable": "domain_features",
    "GDPLConfig": "config",
    "GDPLModel": "model",
    "GDPLSource": "checkpoint",
    "GDPLTrainConfig": "config",
    "Prompts": "prompts",
    "convert_gdpl_state_dict": "upstream",
    "create_clip": "clip_by_name",
    "load_gdpl": "checkpoint",
    "load_upstream": "checkpoint",
    "save_gdpl": "checkpoint",
    "train_gdpl": "train",
}
__all__ = [
    "CoupledLowRank",
    "DomainEncoder",
    "DomainPromptLearner",
    "FeatureTable",
    "GDPLConfig",
    "GDPLModel",
    "GDPLSource",
    "GDPLTrainConfig",
    "Prompts",
    "convert_gdpl_state_dict",
    "create_clip",
    "load_gdpl",
    "load_upstream",
    "save_gdpl",
    "train_gdpl",
]


def __getattr__(name: str) -> object:
    # The settings alone are wanted by the command line, whose help imports nothing heavy.
    if name in _MODULES:
        return getattr(importlib.import_module(f"fastadapt.gdpl.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fastadapt.gdpl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
