"""Keep PyTorch's compiler out of a command that compiles nothing.

``torch._dynamo`` takes 2 to 3 seconds to import, with sympy and much else, and is imported by the
first call of any optimizer and by torchvision, to be told that nothing is compiled. A stand-in in
its place says so. Whatever else is asked of it imports the compiler after all.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"
UTILS = f"{NAME}.utils"


def leave_compiler_out() -> bool:
    """Put the stand-in in place of the compiler, for this process.

    Only before PyTorch is imported: whoever has imported it may compile.

    Returns:
        Whether it is in place.
    """
    if "torch" in sys.modules or importlib.util.find_spec("torch") is None:
        return False
    torch = importlib.util.find_spec("torch")
    folders = list(torch.submodule_search_locations or ()) if torch else []
    stand_in = _StandIn(NAME)
    stand_in.__path__ = [f"{folder}/_dynamo" for folder in folders]
    sys.modules[NAME] = stand_in
    sys.modules[UTILS] = _StandIn(UTILS)
    sys.meta_path.insert(0, _Finder())
    return True


def compiler() -> ModuleType:
    """Import the compiler itself."""
    if isinstance(sys.modules.get(NAME), _StandIn):
        for name in (NAME, UTILS):
            sys.modules.pop(name, None)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    return importlib.import_module(NAME)


class _StandIn(ModuleType):
    """A module of the compiler, as far as programs need it that compile nothing."""

    __path__: list[str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in _ANSWERS:
            return _ANSWERS[name]
        compiler()
        return getattr(importlib.import_module(self.__name__), name)


def _disable(fn: Callable | None = None, *_: Any, **__: Any) -> Callable:
    """Return a function as it is, or a decorator that does."""
    return (lambda function: function) if fn is None else fn


def _is_compile_supported(device_type: str) -> Any:
    compiler()
    return importlib.import_module(UTILS).is_compile_supported(device_type)


_ANSWERS: dict[str, Callable] = {
    "disable": _disable,
    "graph_break": lambda *_, **__: None,
    "is_compile_supported": _is_compile_supported,
}


class _Finder(MetaPathFinder):
    """Import the compiler as soon as any of its other modules is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{NAME}."):
            return None
        compiler()
        if fullname in sys.modules:
            return ModuleSpec(fullname, _Loaded(sys.modules[fullname]))
        return None


class _Loaded(Loader):
    """Give a module that is loaded."""

    def __init__(self, module: ModuleType):
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
