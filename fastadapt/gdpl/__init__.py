"""GDPL: quaternion domain prompts and coupled low-rank adaptation for CLIP models.

import fastadapt as fa
import open_clip

clip = open_clip.create_model("ViT-B-16", pretrained="laion2b_s34b_b88k")
model = fa.gdpl.GDPLModel(clip, "vit_base_patch16_224.mae", ["forest", "river", "harbour"])
logits = model(images)               # [B, 3]; only what GDPL adds has gradients

Source: "Promoting AI Equity in Science: Generalized Domain Prompt Learning for Accessible VLM
Research" (Cao et al.); upstream caoql98/GDPL.
"""

from fastadapt.gdpl.convert import convert_gdpl_state_dict
from fastadapt.gdpl.coupled import CoupledLowRank
from fastadapt.gdpl.domain import DomainEncoder
from fastadapt.gdpl.model import GDPLConfig, GDPLModel
from fastadapt.gdpl.prompts import DomainPromptLearner, Prompts

__all__ = [
    "CoupledLowRank",
    "DomainEncoder",
    "DomainPromptLearner",
    "GDPLConfig",
    "GDPLModel",
    "Prompts",
    "convert_gdpl_state_dict",
]
