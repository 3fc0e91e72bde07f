"""From an adapted model to files that can be deployed: one step a file."""

import importlib

_WHERE = {
    "fold_with_report": "fold",
    "FoldReport": "fold",
    "export_onnx": "onnx",
    "compare": "parity",
    "verify_bundle": "verify",
    "EngineOptions": "engines",
    "load_runtime": "runtimes",
    "export_run": "bundle",
    "export_timm": "bundle",
    "load": "predictor",
    "write_repository": "serving",
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
