"""fastadapt: fused layers that adapt frozen vision models, and an exporter that ships them.

import fastadapt as fa

model = fa.adapt("vit_base_patch16_224", fa.AdaptConfig(), num_classes=4)
...                                  # your training loop
fa.save_adapter(model, "run")
folded = fa.fold(model)              # ordinary PyTorch operators, ready to export
"""

from fastadapt._version import __version__ as __version__

# What type checkers and editors read; nothing is imported before it is asked for, so that the
# command line can answer --help and Ctrl-C at once.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from fastadapt import export, gdpl, kernels
    from fastadapt.adapted_model import AdaptedModel, adapt
    from fastadapt.checkpoint import convert_cladapter_state_dict, load_adapter, save_adapter
    from fastadapt.config import AdaptConfig, LoRAConfig
    from fastadapt.cuda_graph import GraphedCall, GraphedStep
    from fastadapt.data.loader import ImageLoader
    from fastadapt.errors import InputError
    from fastadapt.export.fold import fold
    from fastadapt.layers import CLAdapter, ClusterAttention, LoRALinear, QuaternionLinear
    from fastadapt.lora import load_peft

__all__ = [
    "AdaptConfig",
    "AdaptedModel",
    "CLAdapter",
    "ClusterAttention",
    "GraphedCall",
    "GraphedStep",
    "ImageLoader",
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
_MODULES = {
    "AdaptConfig": "config",
    "AdaptedModel": "adapted_model",
    "CLAdapter": "layers",
    "ClusterAttention": "layers",
    "GraphedCall": "cuda_graph",
    "GraphedStep": "cuda_graph",
    "ImageLoader": "data.loader",
    "InputError": "errors",
    "LoRAConfig": "config",
    "LoRALinear": "layers",
    "QuaternionLinear": "layers",
    "adapt": "adapted_model",
    "convert_cladapter_state_dict": "checkpoint",
    "fold": "export.fold",
    "load_adapter": "checkpoint",
    "load_peft": "lora",
    "save_adapter": "checkpoint",
}


def __getattr__(name: str) -> object:
    import importlib

    if name in _MODULES:
        value = getattr(importlib.import_module(f"fastadapt.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if name in ("export", "gdpl", "kernels"):
        return importlib.import_module(f"fastadapt.{name}")
    raise AttributeError(f"module 'fastadapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
