"""GDPL: quaternion domain prompts and coupled low-rank adaptation for CLIP models.

import fastadapt as fa
import open_clip

clip = open_clip.create_model("ViT-B-16", pretrained="laion2b_s34b_b88k")
model = fa.gdpl.GDPLModel(clip, "vit_base_patch16_224.mae", ["forest", "river", "harbour"])
logits = model(images)               # [B, 3]; only what GDPL adds has gradients

Source: "Promoting AI Equity in Science: Generalized Domain Prompt Learning for Accessible VLM
Research" (Cao et al.); upstream caoql98/GDPL.
"""

import importlib

from fastadapt.gdpl.checkpoint import (
    GDPLSource,
    create_clip,
    load_gdpl,
    load_upstream,
    save_gdpl,
)
from fastadapt.gdpl.domain_encoder import DomainEncoder
from fastadapt.gdpl.domain_features import FeatureTable
from fastadapt.gdpl.low_rank import CoupledLowRank
from fastadapt.gdpl.model import GDPLConfig, GDPLModel
from fastadapt.gdpl.prompts import DomainPromptLearner, Prompts
from fastadapt.gdpl.upstream import convert_gdpl_state_dict

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


def __getattr__(name: str):
    # Training reads and draws: a program that only runs a model does not wait for that.
    if name == "GDPLTrainConfig":
        return importlib.import_module("fastadapt.gdpl.loop").GDPLTrainConfig
    if name == "train_gdpl":
        return importlib.import_module("fastadapt.gdpl.train").train_gdpl
    raise AttributeError(f"module 'fastadapt.gdpl' has no attribute {name!r}")
