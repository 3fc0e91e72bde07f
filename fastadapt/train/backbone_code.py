"""Describe what a backbone of one's own computes beside its weights, for the key of a cache.

A class that is edited keeps its name, and its weights may stay as they are, too. What is described
are layers, simple attributes, and the bytecode of classes and functions that are no library's;
functions that these call by a global name are left out.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.trainable import uncompiled

# Their versions are not told apart here.
_LIBRARIES = ("torch", "torchvision", "timm", "open_clip", "fastadapt", "builtins")
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


def describe_code(model: AdaptedModel) -> list[Any]:
    """Return what a backbone that was given as a module computes, as JSON values.

    Empty for timm's backbones by name with features by name.
    """
    found: list[Any] = []
    if model.source.get("kind") != "timm":
        backbone = uncompiled(model.backbone)
        own = [part for part in backbone.modules() if not _of_library(type(part))]
        classes = {kind for part in own for kind in type(part).__mro__ if not _of_library(kind)}
        found += [
            repr(backbone),
            [_attributes(part) for part in own],
            [_class(kind) for kind in sorted(classes, key=lambda kind: kind.__qualname__)],
        ]
    if callable(model.config.features):
        found.append(_value(model.config.features))
    return found


def _of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _attributes(part: nn.Module) -> list[Any]:
    """List the attributes of a layer that are numbers, texts, or tuples and lists of such."""
    return [
        [name, repr(value)]
        for name, value in sorted(vars(part).items())
        if name != "training" and not name.startswith("_") and _is_simple(value)
    ]


def _is_simple(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_simple, value))
    return isinstance(value, _SIMPLE)


def _class(kind: type) -> list[Any]:
    members = sorted(vars(kind).items())
    return [kind.__qualname__, [[n, _value(v)] for n, v in members if isinstance(v, FunctionType)]]


def _value(value: Any, within: tuple[FunctionType, ...] = ()) -> Any:
    """Describe a value of a program, without addresses where it is a function.

    Args:
        value: to describe.
        within: the functions that it is found in, which may call themselves.
    """
    if isinstance(value, CodeType):
        constants = [_value(constant, within) for constant in value.co_consts]
        return [value.co_code.hex(), value.co_names, value.co_varnames, constants]
    if isinstance(value, FunctionType):
        if value in within:
            return value.__qualname__
        within = (*within, value)
        cells = []
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # of a name that has no value yet
                cells.append(cell.cell_contents)
        given = [value.__defaults__, sorted((value.__kwdefaults__ or {}).items()), cells]
        return [_value(value.__code__, within), _value(given, within)]
    if isinstance(value, MethodType):
        return [_value(value.__func__, within), _value(value.__self__, within)]
    if isinstance(value, partial):
        return _value([value.func, value.args, sorted(value.keywords.items())], within)
    if isinstance(value, tuple | list):
        return [_value(part, within) for part in value]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return repr(value)
