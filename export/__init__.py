"""From an adapted model to files that can be deployed: one step a file."""

import importlib

_WHERE = {
    "fold_with_report": "fold",
    "FoldReport": "fold",
    "export_onnx": "backends.onnx",
    "compare": "bundle.parity",
    "verify_bundle": "bundle.verify",
    "EngineOptions": "bundle.build",
    "load_runtime": "runtimes",
    "export_run": "bundle.pipeline",
    "export_timm": "bundle.pipeline",
    "load": "predictor",
    "write_repository": "backends.triton_server",
}
__all__ = [
    "EngineOptions",
    "FoldReport",
    "compare",
    "export_onnx",
    "export_run",
    "export_timm",
    "fold_with_report",
    "load",
    "load_runtime",
    "verify_bundle",
    "write_repository",
]


def __getattr__(name: str):
    # Each step imports what it needs: folding works without ONNX, verifying without its exporter.
    if name in _WHERE:
        return getattr(importlib.import_module(f"fastadapt.export.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'fastadapt.export' has no attribute {name!r}")
