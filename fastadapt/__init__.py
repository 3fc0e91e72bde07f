"""fastadapt: fused layers that adapt frozen vision models, and an exporter that ships them.

import fastadapt as fa

model = fa.adapt("vit_base_patch16_224", fa.AdaptConfig(), num_classes=4)
...                                  # your training loop
fa.save_adapter(model, "run")
folded = fa.fold(model)              # ordinary PyTorch operators, ready to export
"""

import importlib

from fastadapt import kernels
from fastadapt.adapt import AdaptConfig, AdaptedModel, adapt
from fastadapt.checkpoint import convert_cladapter_state_dict, load_adapter, save_adapter
from fastadapt.cuda_graph import GraphedCall, GraphedStep
from fastadapt.errors import InputError
from fastadapt.layers import CLAdapter, ClusterAttention, LoRALinear, QuaternionLinear
from fastadapt.lora import LoRAConfig, load_peft

__version__ = "0.1.0"
__all__ = [
    "AdaptConfig",
    "AdaptedModel",
    "CLAdapter",
    "ClusterAttention",
    "GraphedCall",
    "GraphedStep",
    "InputError",
    "LoRAConfig",
    "LoRALinear",
    "QuaternionLinear",
    "adapt",
    "convert_cladapter_state_dict",
    "export",
    "fold",
    "gdpl",
    "kernels",
    "load_adapter",
    "load_peft",
    "save_adapter",
]


def __getattr__(name: str):
    # Folding belongs to the exporter, which builds on this package, and GDPL to few programs:
    # reached only when asked for.
    if name == "fold":
        from fastadapt.export.fold import fold

        return fold
    if name in ("gdpl", "export"):
        return importlib.import_module(f"fastadapt.{name}")
    raise AttributeError(f"module 'fastadapt' has no attribute {name!r}")
