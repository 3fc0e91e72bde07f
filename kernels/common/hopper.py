"""The import of kernels for Hopper: on first use, where Triton has what they need."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def hopper_kernels(operation: str, module: str = "hopper_kernels") -> ModuleType | None:
    """Import a module with kernels for Hopper from an operation's folder.

    Args:
        operation: name of the folder in ``kernels/``.
        module: name of the file in it.

    Returns:
        The module; ``None`` where this Triton has another Gluon than the kernels are written for.
    """
    try:
        return importlib.import_module(f"..{operation}.{module}", __package__)
    except (ImportError, AttributeError):
        return None
