"""What converters that trace a model share: quiet libraries, plain attention, example inputs."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.environment_variables import flag


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Make timm's attention use separate operators.

    Some models cannot be exported with the fused one, and this graph has no reshaping around it.
    """
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Hide warnings and log lines of PyTorch and of the loggers named; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch", *names)]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Hide what libraries' C++ code writes to standard error, when they start for one.

    Errors still raise. With FASTADAPT_DEBUG=1 nothing is hidden.
    """
    if flag("FASTADAPT_DEBUG"):
        yield
        return
    sys.stderr.flush()
    with Path(os.devnull).open("wb") as nothing:
        kept = os.dup(2)
        try:
            os.dup2(nothing.fileno(), 2)
            with contextlib.redirect_stderr(io.StringIO()):  # some goes by way of Python's
                yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def dynamic_shapes(model: nn.Module, batch: dict[int, Any], count: int) -> tuple[Any, ...]:
    """Make the batch dynamic in each of ``count`` inputs; a ``*others`` is one argument."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    rest = (batch,) * (count - named)
    return (*(batch,) * min(named, count), *((rest,) if rest else ()))


def plainer(program: Any) -> nn.Module:
    """Return the module of an exported program without what converters for edge runtimes lack.

    That is what is computed of weights alone, and dtypes of means.
    """
    return drop_mean_dtypes(fold_constants(program) or program.module(check_guards=False))


def fold_constants(program: Any) -> nn.Module | None:
    """Compute what an exported program computes of its weights alone, once and for all.

    Position embeddings that a model resamples in each call, for one, by operators that edge
    runtimes lack.

    Args:
        program: of ``torch.export``.

    Returns:
        A module to be exported instead; ``None`` where there is nothing of the kind.
    """
    module: Any = program.module(check_guards=False)
    values: dict[Any, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(module)
        elif (
            node.op == "call_function"
            and node.all_input_nodes
            and all(isinstance(values.get(x), Tensor) for x in node.all_input_nodes)
        ):
            given = torch.fx.node.map_arg((node.args, node.kwargs), lambda x: values[x])
            values[node] = node.target(*given[0], **given[1])
    folded = 0
    for node, value in values.items():
        users = [user for user in node.users if user not in values]
        if node.op != "call_function" or not users or not isinstance(value, Tensor):
            continue
        name = f"folded_{folded}"
        module.register_buffer(name, value.detach().clone())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)
        folded += 1
    if not folded:
        return None
    for node, value in values.items():
        if value is None and not node.users:  # assertions, which hold
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def drop_mean_dtypes(module: Any) -> nn.Module:
    """Leave out dtypes of means that are those of their inputs.

    LiteRT's converter does not know them, and ExecuTorch writes a line about each at every call.

    Args:
        module: of an exported program in fp32; it is changed.
    """
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.mean.dim and "dtype" in node.kwargs:
            assert node.kwargs["dtype"] == node.args[0].meta["val"].dtype
            node.kwargs = {key: v for key, v in node.kwargs.items() if key != "dtype"}
    module.recompile()
    module.training = False  # as it was exported; converters ask
    return module
