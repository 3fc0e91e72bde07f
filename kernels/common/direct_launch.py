"""Launch a kernel through Triton itself, or only compile it, ahead of its first launch.

An operation whose functions are called with meta tensors launches nothing: the kernels that it
would launch begin to compile, in threads, as those launches will ask for them (see
:mod:`.compile_ahead`). Tensors of a call are taken to be aligned to 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compile_ahead import Ahead
from .launcher import StandIn

# What has begun to compile, by kernel, device, arguments and options.
_begun: dict[tuple, Ahead] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, or begin to compile it where its first argument is a meta tensor."""
    if arguments[0].is_meta:
        _compile(kernel, arguments, options)
    else:
        kernel[grid](*arguments, **options)


def compiled_by(call: Callable[[], object]) -> list[Ahead]:
    """Begin to compile what a call with meta tensors launches, for the current GPU.

    Args:
        call: of operations, with meta tensors.

    Returns:
        The threads that compile, without those that began before.
    """
    before = len(_begun)
    call()
    return list(_begun.values())[before:]


def _compile(kernel: Any, arguments: tuple, options: dict[str, Any]) -> None:
    device = torch.cuda.current_device()
    kinds = [
        _kind(value, parameter.do_not_specialize)
        for value, parameter in zip(arguments, kernel.params, strict=False)
    ]
    variant = (id(kernel), device, *kinds, *sorted(options.items()))
    if variant not in _begun:
        given = [StandIn(x.dtype, None) if isinstance(x, Tensor) else x for x in arguments]
        _begun[variant] = Ahead(kernel, device, given, options)


def _kind(value: Any, is_general: bool) -> Any:
    """Return what Triton compiles apart."""
    if isinstance(value, Tensor):
        return value.dtype
    if type(value) is int and not is_general:
        return value == 1, value % 16 == 0
    return type(value)
