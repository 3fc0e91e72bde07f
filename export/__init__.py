"""From a trained model to files that can be deployed.

What imports what, lowest first:

1. ``fold`` and ``folded_layers`` make a plain PyTorch model of a trained one. ``parity``,
   ``tasks``, ``artefact``, ``speed`` and ``graph_input`` hold what all others share.
2. ``backends`` write one file format each; ``runtimes`` run these files.
3. ``precision``: half precision, INT8 and FP8.
4. ``bundle``: the folder of files that is deployed: how it is made, checked and read.
5. ``predictor`` and ``triton_server`` use a bundle.
"""

import importlib
from typing import Any

_MODULES = {
    "BatchPredictor": "predict.batch_predictor",
    "EngineOptions": "bundle.engine_options",
    "FoldReport": "fold",
    "compare": "parity",
    "export_onnx": "backends.onnx",
    "export_run": "bundle.pipeline",
    "export_tasks": "bundle.pipeline",
    "export_timm": "bundle.pipeline",
    "fold_with_report": "fold",
    "load": "predictor",
    "load_runtime": "runtimes",
    "verify_bundle": "bundle.verify",
    "write_repository": "triton_server",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    # Each name imports what it needs: folding works without ONNX, verifying without its exporter.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
