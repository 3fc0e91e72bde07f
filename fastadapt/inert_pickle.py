"""A pickle module for ``torch.load`` that rebuilds tensors and containers and runs nothing else.

Trainers put more than tensors into their files: timm an ``argparse.Namespace``, dassl a scheduler.
Every class or function that is not listed in :data:`REBUILT` becomes an inert stand-in: it takes
any arguments, keeps none and does nothing. So no code of a file, or chosen by a file, is called.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor


class Inert(dict[Any, Any]):
    """Stand in for an object of a class that is not rebuilt.

    Attributes:
        origin: module and name of the class or function.
    """

    __slots__ = ()
    origin = ""
    dump_patches = False  # torch.load asks pickled modules for it

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Make one, whatever the arguments."""
        return dict.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Do nothing."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Ignore a state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item."""

    def append(self, item: Any) -> None:
        """Ignore an item."""

    def extend(self, items: Any) -> None:
        """Ignore items."""

    def add(self, item: Any) -> None:
        """Ignore an item."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Mapping(dict[Any, Any]):
    """Hold an ``OrderedDict``'s or ``defaultdict``'s items without its attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes."""


class Rebuild:
    """Wrap a function that a file may call, so that the file cannot change it."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        """Rebuild a tensor or a container."""
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a file may not change functions")

    def __setstate__(self, state: Any) -> None:
        """Refuse to be changed."""
        raise pickle.UnpicklingError("a file may not change functions")


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """View a storage as a tensor, if it is large enough."""
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor has negative sizes")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    held = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if all(size) and last >= held:
        raise pickle.UnpicklingError(f"a tensor {list(size)} is larger than its data")
    empty = torch.empty(0, dtype=storage.dtype, device=storage._untyped_storage.device)
    return empty.set_(storage._untyped_storage, offset, size, stride)


def _tensor_v2(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return _tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, _: Any, args: Any, *__: Any) -> Any:
    return function(*args) if isinstance(function, Rebuild) else Inert()


def _mapping(*args: Any) -> Mapping:
    items = args[-1] if args and isinstance(args[-1], dict | list) else ()
    return Mapping(items)


REBUILT: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): Rebuild(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v2"): Rebuild(_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): Rebuild(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Rebuild(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Rebuild(_from_type),
    ("collections", "OrderedDict"): Rebuild(_mapping),
    ("collections", "defaultdict"): Rebuild(_mapping),
    ("torch", "Size"): Rebuild(tuple),
    **{(module, "set"): Rebuild(set) for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): Rebuild(frozenset) for module in ("builtins", "__builtin__")},
}


class Unpickler(pickle._Unpickler):
    """Unpickle tensors and containers; ``torch.load`` derives its own from it.

    It is the one in Python: that in C reserves a table as long as the largest number that a file
    gives one of its objects, and so all memory for a damaged byte.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def load_bytearray8(self) -> None:
        """Refuse an array whose length a file only claims."""
        raise pickle.UnpicklingError("a checkpoint holds no arrays of bytes")

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str) -> Any:
        """Return what rebuilds a class's objects: a listed function, or a stand-in's class."""
        found = REBUILT.get((module, name))
        if found is not None:
            return found
        return type("Inert", (Inert,), {"origin": f"{module}.{name}", "__slots__": ()})


def load(file: Any, **options: Any) -> Any:
    """Unpickle one object of a file, as :func:`pickle.load` does."""
    return Unpickler(file, **options).load()
