"""The operators that PyTorch's ONNX exporter knows, read once for all exports of a process."""

import copy
import functools


def keep_onnx_registry() -> None:
    """Have the exporter copy its registry of operators instead of reading 500 functions' sources.

    That is half a second of each export. Where a release has it elsewhere, nothing is changed.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read = functools.cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):
        return

    def from_torchlib(*args, **kwargs):
        registry = copy.copy(read(*args, **kwargs))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
