"""Fuse an exported program's operators where AOTInductor would not, for a GPU in half precision.

Inductor computes GELU in a kernel after its product, and a depthwise convolution by cuDNN with the
norm after it in another kernel. Here, in the program that :func:`torch.export.export` returned:

    (1) gelu(linear(x, W, b))                   ATen's ``_addmm_activation``: GELU in its tanh form,
                                                in cuBLASLt's epilogue
    (2) layer_norm(conv2d(x, filters, b))       fastadapt's kernel, which the file then holds, where
        over channels, 7 × 7, depthwise         the convolution's result is otherwise unused

Inductor has no decomposition of ``_addmm_activation`` and calls it as it is (the C interface of
libtorch has it, in PyTorch 2.11 and 2.14). A residual sum has no such operator: ``addmm`` copies
what it adds to before it multiplies, as much memory as the sum itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastadapt.kernels.depthwise_norm.checks import MAX_CHANNELS, SIZE

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
MULTIPLE = 8  # of a product's sizes, for cuBLASLt's fast kernels
# What an exported program has between operators, and changes nothing in evaluation mode.
_IDLE = (aten.to.dtype, aten.dropout.default)


@dataclass(frozen=True)
class Fusions:
    """How many operators of a program were fused."""

    gelu: int = 0
    depthwise: int = 0


def fuse(program: Any, takes: Callable[[Tensor], bool]) -> tuple[nn.Module | None, Fusions]:
    """Return the module of an exported program with operators fused, to be exported again.

    Args:
        program: of ``torch.export``; it stays as it is.
        takes: tells of an operator's input (a fake tensor) whether it may be fused.

    Returns:
        The module, or ``None`` where there is nothing to fuse; and what was fused.
    """
    module: GraphModule = program.module(check_guards=False)
    nodes = list(module.graph.nodes)
    depthwise = sum(_fuse_depthwise(module, node, takes) for node in nodes)
    gelu = sum(_fuse_gelu(module, node, takes) for node in nodes)
    found = Fusions(gelu, depthwise)
    if found == Fusions():
        return None, found
    module.graph.eliminate_dead_code()
    module.recompile()
    module.training = False
    return module, found


def on_gpu_in_half(x: Tensor) -> bool:
    """Tell whether an operator's input is in half precision on a GPU."""
    return x.is_cuda and x.dtype in HALF


def _fuse_gelu(module: GraphModule, node: Node, takes: Callable[[Tensor], bool]) -> bool:
    """Put GELU into the linear layer before it."""
    if node.target is not aten.gelu.default or node.kwargs.get("approximate", "none") != "none":
        return False
    linear = _producer(node, aten.linear.default)
    if linear is None or len(linear.args) < 3 or not isinstance(linear.args[2], Node):
        return False
    x, weight, bias = (_value(argument) for argument in linear.args)
    if x is None or weight is None or bias is None or not takes(x) or bias.dtype != x.dtype:
        return False
    inner = x.shape[1:-1]
    if any(size % MULTIPLE for size in weight.shape) or not all(type(n) is int for n in inner):
        return False
    graph = module.graph
    with graph.inserting_before(node):
        rows, filters, vector = linear.args
        if x.dim() > 2:
            rows = graph.call_function(aten.reshape.default, (rows, [-1, x.shape[-1]]))
        y = graph.call_function(
            aten._addmm_activation.default,
            (vector, rows, graph.call_function(aten.t.default, (filters,))),
            {"use_gelu": True},
        )
        if x.dim() > 2:
            y = graph.call_function(aten.reshape.default, (y, [-1, *inner, weight.shape[0]]))
    _replace(node, y)
    return True


def _fuse_depthwise(module: GraphModule, node: Node, takes: Callable[[Tensor], bool]) -> bool:
    """Put a norm over channels and the depthwise convolution before it into one operator."""
    if node.target is not aten.layer_norm.default or len(node.args) < 4:
        return False
    permute = _producer(node, aten.permute.default)
    if permute is None or permute.args[1] != [0, 2, 3, 1]:
        return False
    conv = _producer(permute, aten.conv2d.default)
    if conv is None or not _is_covered(conv, takes):
        return False
    image, weight, bias = conv.args[:3]
    vectors = [_value(argument) for argument in (bias, *node.args[2:4])]
    x = _value(image)
    if x is None or any(v is None for v in vectors) or node.args[1] != [x.shape[1]]:
        return False
    from fastadapt.kernels.depthwise_norm.aot import depthwise_layer_norm  # noqa: F401

    taps = _constant(module, weight, lambda w: w.detach().flatten(1).t().contiguous())
    if taps is None:
        return False
    graph = module.graph
    with graph.inserting_before(node):
        last = graph.call_function(aten.permute.default, (image, [0, 2, 3, 1]))
        eps = node.args[4] if len(node.args) > 4 else 1e-5
        y = graph.call_function(
            torch.ops.fastadapt.depthwise_layer_norm.default,
            (last, graph.get_attr(taps), bias, *node.args[2:4], eps),
        )
    _replace(node, y)
    return True


def _is_covered(conv: Node, takes: Callable[[Tensor], bool]) -> bool:
    """Tell whether a convolution is a depthwise one that the kernel computes."""
    x, filters = (_value(argument) for argument in conv.args[:2])
    if x is None or filters is None or not takes(x):
        return False
    channels = x.shape[1]
    defaults: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], 1)
    form = [*conv.args[3:], *defaults[len(conv.args) - 3 :]]
    return (
        all(type(size) is int for size in x.shape[1:])
        and channels <= MAX_CHANNELS
        and form == [[1, 1], [SIZE // 2] * 2, [1, 1], channels]
        and tuple(filters.shape) == (channels, 1, SIZE, SIZE)
    )


def _producer(node: Node, target: Any) -> Node | None:
    """Return the node of ``target`` that made a node's input, where nothing else uses it."""
    given = node.args[0]
    while isinstance(given, Node) and len(_users(given)) == 1:
        if given.target is target:
            return given
        if given.target not in _IDLE or _changes(given):
            return None
        given = given.args[0]
    return None


def _users(node: Node) -> list[Node]:
    """Return what uses a node, without statements about its dtype."""
    return [user for user in node.users if user.target is not aten._assert_tensor_metadata.default]


def _changes(node: Node) -> bool:
    """Tell whether an idle operator is none: a cast to another dtype, dropout in training."""
    if node.target is aten.dropout.default:
        return bool(node.args[2])
    before, after = _value(node.args[0]), _value(node)
    return before is None or after is None or before.dtype != after.dtype


def _value(node: Any) -> Tensor | None:
    """Return the fake tensor that stands for a node's result."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _constant(module: GraphModule, node: Any, make: Callable[[Tensor], Tensor]) -> str | None:
    """Keep what follows from a parameter as a buffer; return its name, or ``None``."""
    while node.op == "call_function" and node.target in _IDLE and not _changes(node):
        node = node.args[0]
    if node.op != "get_attr":
        return None
    name = f"fused_{sum(1 for _ in module.buffers(recurse=False))}"
    module.register_buffer(name, make(operator.attrgetter(node.target)(module)))
    return name


def _replace(node: Node, new: Node) -> None:
    """Let a new node stand for another, and for the statements about what it was made of."""
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    old: Any = node
    while isinstance(old, Node) and old.op == "call_function" and not _users(old):
        for statement in list(old.users):
            old.graph.erase_node(statement)
        given = old.args[0]
        old.graph.erase_node(old)
        old = given
