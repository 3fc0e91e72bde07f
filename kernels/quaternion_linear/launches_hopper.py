"""Launches of Hopper's kernel: Hamilton products of large layers in half precision."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.hopper import hopper_kernels
from ..common.launcher import Box, Device, Launch, gluon_box
from .block_sizes import hopper_columns
from .form import Form, GroupLayout
from .hamilton_terms import Kind, hamilton_terms
from .launches_sums import Reduction, Step, column_sums_launch, sequence, sum_partials

TILE_ROWS, TILE_DEPTH = 128, 64


class Operand(NamedTuple):
    """Shape and row stride of a matrix that bulk copies read."""

    shape: tuple[int, int]
    row_stride: int


class Size(NamedTuple):
    """Sizes of the products, of one component each, and of the result's tiles."""

    depth: int  # what is reduced
    height: int
    width: int
    cols: int  # of a tile


class Split(NamedTuple):
    """How the reduction over the rows is cut, for the weights' gradients."""

    steps: int  # of 64 rows, of one split
    splits: int
    chunk: int  # steps of all terms before the next rows


def takes(layout: GroupLayout, form: Form, device: Device) -> bool:
    """Say whether the kernel takes a layer: large, in half precision, all tiles whole."""
    return (
        layout.rows >= 128
        and layout.rows * form.inputs * form.outputs >= 2**25
        and layout.groups == 1
        and form.inputs % 64 == 0
        and form.outputs % 64 == 0
        and not form.rotation
        and form.dtype != torch.float32
        and device.has_warp_group_products
        and hopper_kernels("quaternion_linear") is not None
    )


def new_sums(layout: GroupLayout, db: Tensor, form: Form, device: Device) -> Tensor | None:
    """Allocate the sums of g over blocks of 64 rows, where the kernel of dx leaves them.

    Args:
        layout: of g.
        db: the bias's gradient [4·O].

    Returns:
        [blocks, 4·O] fp32; ``None`` where the kernel does not take the layer.
    """
    if not takes(layout, form, device):
        return None
    count = 2 * ceil_div(layout.rows, TILE_ROWS)
    return torch.empty((count, db.numel()), dtype=torch.float32, device=db.device)


def linear(
    x: Tensor,
    layout: GroupLayout,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    out: Tensor,
    form: Form,
    device: Device,
    *,
    backward: bool,
    sums: Tensor | None,
) -> Step:
    """Prepare y = W ⊗ x + bias in ``out``; backward dx = W̄ ⊗ g, with x = g, and g's sums."""
    kind: Kind = "input" if backward else "output"
    if form.weight_dtype != form.dtype:  # autocast
        packed = torch.empty((4, *weights[0].shape), dtype=form.dtype, device=x.device)
        weights = torch.stack(list(weights), out=packed).unbind()
    bias_dtype = None if bias is None else bias.dtype
    if all(map(is_packed, (x, *weights))):  # without views, which cost more than the launch
        launch = _packed_launch(
            kind, layout.rows, x.shape[-1], bias_dtype, form, device, sums is not None
        )
    else:
        x = _copyable(x)
        weights = [_copyable(w.view(w.shape[-2:])) for w in weights]
        operands = tuple([_operand(t) for t in (x, *weights)])
        launch = _linear_launch(kind, operands, bias_dtype, form, device, sums is not None)
    return functools.partial(launch, x, *weights, out, bias, sums)


def gradients(
    x: Tensor,
    g: Tensor,
    g_layout: GroupLayout,
    dw: Tensor,
    db: Tensor | None,
    form: Form,
    device: Device,
    *,
    sums: Tensor | None,
) -> Step:
    """Prepare dW = g ⊗ x̄ and the bias's gradient, from ``sums`` where they are there."""
    rows, inputs, outputs = g_layout.rows, form.inputs, form.outputs
    steps = ceil_div(rows, TILE_DEPTH)
    tiles_m = ceil_div(inputs, TILE_ROWS)
    # Fewer columns mean fewer partials to add, more mean fewer bytes per product.
    cols = hopper_columns(outputs, 10**9 if rows >= 16384 else 4 * tiles_m, device)
    cols = max(cols, min(128, outputs & -outputs))
    tiles = 4 * tiles_m * (outputs // cols)
    splits = max(1, min(steps // 4, device.multiprocessors // tiles))
    reductions = []
    result = dw
    if splits > 1:
        result = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
        reductions.append(Reduction(result, dw))
    left, right = _copyable(x), _copyable(g)
    # So many steps of all components before the next rows: with the splits all over x and g, they
    # come from memory once and the other times from L2.
    split = Split(ceil_div(steps, splits), splits, chunk=16 if splits == 1 else 4)
    launch = _product_launch(
        "weights",
        (_operand(left), _operand(right), None, None, None),
        None,
        form,
        device,
        Size(rows, inputs, outputs, cols),
        split=split,
    )
    run: list[Step] = [functools.partial(launch, left, right, None, None, None, result, None, None)]
    if db is not None:
        if sums is None:
            sums_launch, count = column_sums_launch(g_layout, db.numel(), form.dtype, device)
            sums = torch.empty((count, db.numel()), dtype=torch.float32, device=x.device)
            run.append(functools.partial(sums_launch, g, sums))
        reductions.append(Reduction(sums, db))
    if reductions:
        run.append(sum_partials(device, *reductions))
    return sequence(*run)


def is_packed(t: Tensor) -> bool:
    """Say whether bulk copies can read t as it lies, whatever its shape."""
    return t.is_contiguous() and t.data_ptr() % 16 == 0


def _copyable(t: Tensor) -> Tensor:
    """Return a matrix that bulk copies can read: rows of whole 16 bytes, columns side by side."""
    t = t if t.dim() == 2 else t.view(-1, t.shape[-1])
    if t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.stride(0) and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _operand(t: Tensor) -> Operand:
    return Operand((t.shape[0], t.shape[1]), t.stride(0))


@functools.lru_cache(maxsize=4096)
def _packed_launch(
    kind: Kind,
    rows: int,
    width: int,
    bias_dtype: torch.dtype | None,
    form: Form,
    device: Device,
    sums: bool,
) -> Launch:
    """Prepare y or dx for operands that :func:`is_packed` holds for."""
    weight = Operand((form.inputs, form.outputs), form.outputs)
    operands = (Operand((rows, width), width), *(weight,) * 4)
    return _linear_launch(kind, operands, bias_dtype, form, device, sums)


def _linear_launch(
    kind: Kind,
    operands: tuple[Operand, ...],
    bias_dtype: torch.dtype | None,
    form: Form,
    device: Device,
    sums: bool,
) -> Launch:
    """Prepare y or dx: the left factor, then the four weights."""
    depth, width = form.outputs, form.inputs
    count = 2 if form.zero_half else 4
    if kind == "output":
        depth, width, count = form.inputs, form.outputs, 4
    left = operands[0]
    height = left.shape[0]
    cols = hopper_columns(width, ceil_div(height, TILE_ROWS) * count, device)
    size = Size(depth, height, width, cols)
    return _product_launch(kind, operands, bias_dtype, form, device, size, sums=sums)


@functools.lru_cache(maxsize=4096)
def _product_launch(
    kind: Kind,
    operands: tuple[Operand | None, ...],
    bias_dtype: torch.dtype | None,
    form: Form,
    device: Device,
    size: Size,
    *,
    split: Split | None = None,
    sums: bool = False,
) -> Launch:
    """Prepare the kernel for a left operand and up to four right ones."""
    kernels = hopper_kernels("quaternion_linear")
    assert kernels is not None  # else nothing would be taken
    whole = size.depth // TILE_DEPTH
    steps, splits, chunk = split or Split(whole, 1, whole)
    order, negative, terms = hamilton_terms(kind, form.zero_half)
    half_result = form.zero_half and kind == "input"
    first, count = (2, 2) if half_result else (0, 4)
    tiles_m, tiles_n = ceil_div(size.height, TILE_ROWS), size.width // size.cols
    tiles = splits * tiles_m * tiles_n * count
    weights = kind == "weights"
    right_box = (size.cols, TILE_DEPTH) if kind == "input" else (TILE_DEPTH, size.cols)
    # As many stages as fit beside the two groups' results and the barriers.
    staging = 0 if weights else 2 * 64 * size.cols * 2
    stages = (device.shared - staging - 1024) // ((TILE_ROWS + size.cols) * TILE_DEPTH * 2)

    def described(number: int, operand: Operand | None, box) -> tuple[int, Box | None] | None:
        if operand is None:
            return None
        return number, gluon_box(operand.shape, box, form.dtype, (operand.row_stride, 1))

    out_width = count * size.width
    out = None if weights else Operand((size.height, out_width), out_width)
    left, *rights = operands
    result = form.dtype
    if weights:
        result = form.weight_dtype if splits == 1 else torch.float32
    variant = kernels.HamiltonProduct(
        kind, terms, bias_dtype is not None, sums, min(6, stages), size.cols
    )
    return Launch(
        kernels.hamilton_product_kernel,
        (min(tiles, device.multiprocessors),),
        device,
        (
            order,
            negative,
            first,
            count,
            size.depth,
            size.height,
            size.width,
            steps,
            chunk,
            tiles,
            tiles_m,
            tiles_n,
        ),
        (variant,),
        warps=4,
        tensors=(
            described(0, left, (64, 64)),
            *(described(1 + i, right, right_box) for i, right in enumerate(rights)),
            described(5, out, (64, size.cols)),
            (5, None) if weights else None,
            None if bias_dtype is None else (6, None),
            (7, None) if sums else None,
        ),
        dtypes=(*(form.dtype,) * 5, result, bias_dtype, torch.float32 if sums else None),
    )
