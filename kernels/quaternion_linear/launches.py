"""Launchers of the quaternion kernels: which kernel, with which tiles, for which size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block, device_of, gluon_box
from . import triton_kernels as kernels

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Form(NamedTuple):
    """What a layer computes, beside its sizes."""

    inputs: int  # I
    outputs: int  # O
    groups: int | None
    rotation: bool
    scale: bool
    zero_half: bool
    dtype: torch.dtype
    weight_dtype: torch.dtype
    ieee: bool  # fp32 without TF32


class Rows(NamedTuple):
    """How [G, M, width] lies in memory."""

    groups: int
    rows: int
    group_stride: int
    row_stride: int
    col_stride: int


class Tile(NamedTuple):
    """Launch configuration of one product: its tile, warps, stages, parts of the reduction.

    On Hopper, tiles of 64 rows have four warps: with eight, Triton 3.6 lays some of the products
    that add up over 128 rows, and they read beyond the tile.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    splits: int = 1


def _tall(device: Device) -> bool:
    """Whether products of 64 rows fit the registers: where groups of four warps multiply."""
    return device.major in (9, 10)


def linear_tile(rows: int, depth: int, width: int, groups: int, form: Form, device: Device) -> Tile:
    """The rule for output and gradient of x."""

    def tiles(tile: Tile) -> int:
        return ceil_div(rows, tile.rows) * ceil_div(width, tile.cols) * groups

    large = Tile(64, 64, 32, 4, 2 if form.rotation else 3)
    if form.dtype == torch.float32:
        # On the multipliers of single numbers: short, or the operands fill the registers.
        tile = Tile(16 if rows <= 64 else 32, 32, 16, 8, 2)
    elif _tall(device) and tiles(large) >= device.multiprocessors:
        tile = large
    elif form.rotation:
        tile = Tile(16, 32, 32, 4, 3)
    else:
        tile = Tile(16, 32, 64, 4, 4 if depth >= 512 else 3)
    # A second pass adds the parts: worth it only for long reductions.
    least = 2 if form.rotation or form.dtype == torch.float32 else 8
    splits = min(4, device.multiprocessors // tiles(tile), ceil_div(depth, tile.depth) // least)
    return tile._replace(splits=max(1, splits))


def gradient_tile(
    rows: int, inputs: int, outputs: int, groups: int, form: Form, device: Device
) -> Tile:
    """The rule for gradients of weights: ``depth`` runs over the rows of x."""

    def tiles(tile: Tile) -> int:
        return ceil_div(inputs, tile.rows) * ceil_div(outputs, tile.cols) * groups

    if form.dtype == torch.float32:
        tile = Tile(32, 32, 16, 8, 2)
    elif form.rotation:
        tile = Tile(64, 16, 32, 4, 2)
    elif rows <= 16:
        shapes = (Tile(64, 64, 16, 4, 2), Tile(64, 32, 16, 4, 2))
        crowded = (t for t in shapes if tiles(t) >= device.multiprocessors)
        tile = next(crowded, Tile(32, 32, 16, 4, 2))
    elif _tall(device) and tiles(Tile(64, 32, 64, 4, 2)) >= device.multiprocessors:
        tile = Tile(64, 32, 64, 4, 2 if rows <= 256 else 3)
    else:
        tile = Tile(16, 32, 64, 4, 2)
    splits = min(32, device.multiprocessors // tiles(tile), ceil_div(rows, tile.depth) // 4)
    return tile._replace(splits=max(1, splits))


def forward(x, weights, bias, scale, *, rotation: bool, zero_half: bool) -> Tensor:
    """y [..., 4·O] in x's dtype; arguments as ``quaternion_linear``."""
    form = _form(x, weights, scale, rotation, zero_half)
    y = torch.empty((*x.shape[:-1], 4 * form.outputs), dtype=x.dtype, device=x.device)
    if y.numel():
        x, rows = _rows(x, form.groups)
        _linear(x, rows, _contiguous(weights), _contiguous((bias, scale)), y, form, False)()
    return y


def backward(g, x, weights, scale, *, rotation, zero_half, need_x, need_w, need_b, bias_dtype):
    """Gradients of ``forward``.

    Returns:
        Of x; of the weights (and the scale, if there is one) as one tensor [4 (5), …]; of the
        bias. ``None`` for what is not needed.
    """
    form = _form(x, weights, scale, rotation, zero_half)
    device, shape = x.device, weights[0].shape
    # Without rows, nothing will write them.
    new = torch.empty if x.numel() else torch.zeros
    dx = torch.empty(x.shape, dtype=x.dtype, device=device) if need_x else None
    dw = db = None
    if need_w:
        dw = new((5 if form.scale else 4, *shape), dtype=form.weight_dtype, device=device)
    if need_b:
        db = new((*shape[:-2], 4 * form.outputs), dtype=bias_dtype, device=device)
    if x.numel() == 0:
        return dx, dw, db
    g, g_rows = _rows(g, form.groups)
    weights, others = _contiguous(weights), _contiguous((None, scale))
    # All launches are prepared before any runs: their kernels compile side by side.
    steps = []
    sums = None
    if need_x:
        if need_w and need_b and _specialised(g_rows, form, device_of(device.index)):
            # The kernel of dx reads all of g, and sums its columns.
            count = 2 * ceil_div(g_rows.rows, 128)
            sums = torch.empty((count, db.numel()), dtype=torch.float32, device=device)
        steps.append(_linear(g, g_rows, weights, others, dx, form, True, sums))
    if need_w or need_b:
        x, x_rows = _rows(x, form.groups)
        args = (weights, others[1], dw, db, form, sums)
        steps.append(_gradients(x, x_rows, g, g_rows, *args))
    for run in steps:
        run()
    return dx, dw, db


def _form(x: Tensor, weights, scale, rotation: bool, zero_half: bool) -> Form:
    *groups, inputs, outputs = weights[0].shape
    return Form(
        inputs,
        outputs,
        groups[0] if groups else None,
        rotation,
        scale is not None,
        zero_half,
        x.dtype,
        weights[0].dtype,
        x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32,
    )


def _contiguous(tensors) -> list[Tensor | None]:
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def _rows(x: Tensor, groups: int | None) -> tuple[Tensor, Rows]:
    """x as [G, M, width], a copy only where its strides allow no view."""
    width = x.shape[-1]
    g = groups or 1
    m = x.numel() // (g * width)
    if x.is_contiguous():
        return x, Rows(g, m, 0 if groups is None else m * width, width, 1)
    x = x.reshape(m, width) if groups is None else x.reshape(g, m, width)
    return x, Rows(g, m, 0 if groups is None else x.stride(0), x.stride(-2), x.stride(-1))


def _linear(
    x, rows: Rows, weights, others, out, form: Form, back: bool, sums: Tensor | None = None
) -> Callable[[], None]:
    """What makes y = W ⊗ x + bias in ``out``, or back: dx = W̄ ⊗ g, with x = g.

    ``sums`` gets the sums of g over blocks of 64 rows, where Hopper's kernel takes the layer.
    """
    bias, scale = others
    device = device_of(x.device.index)
    if _specialised(rows, form, device):
        return _large_linear(x, rows, weights, bias, out, form, device, back, sums)
    run, splits = _linear_launch(rows, None if bias is None else bias.dtype, form, device, back)
    if splits == 1:
        return functools.partial(run, x, *weights, scale, bias, out)
    parts = torch.empty((splits, out.numel()), dtype=torch.float32, device=x.device)
    first = functools.partial(run, x, *weights, scale, bias, parts)
    return _sequence(first, _reduce(device, (parts, out)))


def _sequence(*steps: Callable[[], None]) -> Callable[[], None]:
    def run():
        for step in steps:
            step()

    return run


@functools.lru_cache(maxsize=4096)
def _linear_launch(rows: Rows, bias_dtype, form: Form, device: Device, back: bool):
    depth, width = (form.outputs, form.inputs) if back else (form.inputs, form.outputs)
    tile = linear_tile(rows.rows, depth, width, rows.groups, form, device)
    run = Launch(
        kernels.linear_kernel,
        (ceil_div(rows.rows, tile.rows) * ceil_div(width, tile.cols), tile.splits, rows.groups),
        device,
        (rows.rows, depth, width, *rows[2:], _part(depth, tile)),
        (
            tile.rows,
            tile.cols,
            tile.depth,
            back,
            form.rotation,
            form.scale,
            bias_dtype is not None,
            form.zero_half and not back,
            form.zero_half and back,
            _DTYPES[form.dtype],
            "ieee" if form.ieee else "tf32",
        ),
        warps=tile.warps,
        stages=tile.stages,
        dtypes=(
            form.dtype,
            *_weight_dtypes(form),
            bias_dtype,
            form.dtype if tile.splits == 1 else torch.float32,
        ),
    )
    return run, tile.splits


def _weight_dtypes(form: Form) -> tuple[torch.dtype | None, ...]:
    """Of the four weights and the scale, as far as they are known."""
    return *(form.weight_dtype,) * 4, form.weight_dtype if form.scale else None


def _gradients(
    x, x_rows: Rows, g, g_rows: Rows, weights, scale, dw, db, form: Form, sums: Tensor | None
) -> Callable[[], None]:
    """What makes dW = g ⊗ x̄ and the bias's gradient, summed over all rows, or from ``sums``."""
    device = device_of(x.device.index)
    if dw is not None and _specialised(x_rows, form, device):
        return _large_gradients(x, g, g_rows, dw, db, form, device, sums)
    bias_dtype = None if db is None else db.dtype
    run, splits = _gradient_launch(x_rows, g_rows, dw is not None, bias_dtype, form, device)
    if splits == 1:
        return functools.partial(run, x, g, *weights, scale, dw, db)
    pairs = [
        (torch.empty((splits, out.numel()), dtype=torch.float32, device=x.device), out)
        for out in (dw, db)
        if out is not None
    ]
    parts = [pair[0] for pair in pairs]
    dw_parts = parts[0] if dw is not None else None
    db_parts = parts[-1] if db is not None else None
    first = functools.partial(run, x, g, *weights, scale, dw_parts, db_parts)
    return _sequence(first, _reduce(device, *pairs))


@functools.lru_cache(maxsize=4096)
def _gradient_launch(x_rows: Rows, g_rows: Rows, need_w: bool, bias_dtype, form, device):
    inputs = form.inputs if need_w else 1  # for the bias alone, one tile of them
    tile = gradient_tile(x_rows.rows, inputs, form.outputs, x_rows.groups, form, device)
    tiles = ceil_div(inputs, tile.rows) * ceil_div(form.outputs, tile.cols)
    results = [form.weight_dtype if need_w else None, bias_dtype]
    if tile.splits > 1:
        results = [dtype and torch.float32 for dtype in results]
    run = Launch(
        kernels.gradient_kernel,
        (tiles, tile.splits, x_rows.groups),
        device,
        (
            x_rows.rows,
            form.inputs,
            form.outputs,
            *x_rows[2:],
            *g_rows[2:],
            _part(x_rows.rows, tile),
        ),
        (
            tile.depth,
            tile.rows,
            tile.cols,
            form.rotation,
            form.scale,
            form.zero_half,
            need_w,
            bias_dtype is not None,
            _DTYPES[form.dtype],
            "ieee" if form.ieee else "tf32",
        ),
        warps=tile.warps,
        stages=tile.stages,
        dtypes=(form.dtype, form.dtype, *_weight_dtypes(form), *results),
    )
    return run, tile.splits


def _part(size: int, tile: Tile) -> int:
    """How much of a reduction over ``size`` one split does: whole tiles."""
    return ceil_div(size, tile.splits * tile.depth) * tile.depth


def _reduce(
    device: Device,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> Callable[[], None]:
    """What sums parts [splits, count] to results [count], of one or two at once."""
    sizes = [
        (0, 1, None) if out is None else (out.numel(), parts.shape[0], out.dtype)
        for parts, out in (a, b)
    ]
    return functools.partial(_reduce_launch(*sizes, device), *a, *b)


@functools.lru_cache(maxsize=4096)
def _reduce_launch(a, b, device: Device) -> Launch:
    # Of the parts at once, 16 numbers for each thread.
    at_once = [128 if parts > 64 else min(16, block(max(parts, 1), 1)) for _, parts, _ in (a, b)]
    sizes = [2048 // n for n in at_once]
    return Launch(
        kernels.reduce_kernel,
        (ceil_div(a[0], sizes[0]) + ceil_div(b[0], sizes[1]),),
        device,
        (a[0], b[0], a[1], b[1]),
        (at_once[0], sizes[0], at_once[1], sizes[1]),
        warps=4,
        dtypes=(torch.float32, a[2], b[2] and torch.float32, b[2]),
    )


# Large Hamilton products on Hopper: sums of terms left[a] @ right[a ^ c].

_SIGNS = ((1, 1, 1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1), (-1, 1, -1, 1))  # of x_a in y_c


@functools.cache
def _terms(kind: str, zero_half: bool) -> tuple[int, int, int]:
    """For every component c of a result, which a come in which order, negative signs first.

    Args:
        kind: ``"output"`` (a of x), ``"input"`` (a of the gradient of y) or ``"weights"`` (a of
            x, with the component a ^ c of the gradient of y).

    Returns:
        The order, 2 bits a term, 8 bits a component; how many are negative, 4 bits a component;
        how many terms there are.
    """
    order = negative = 0
    used = (2, 3) if zero_half and kind != "input" else (0, 1, 2, 3)
    for c in range(4):
        sign = {
            "output": lambda a, c=c: _SIGNS[a][c],
            "input": lambda a, c=c: _SIGNS[c][a],
            "weights": lambda a, c=c: _SIGNS[a][a ^ c],
        }[kind]
        for place, a in enumerate(sorted(used, key=sign)):
            order |= a << (8 * c + 2 * place)
        negative |= sum(sign(a) < 0 for a in used) << (4 * c)
    return order - 2**32 if order >= 2**31 else order, negative, len(used)


@functools.lru_cache
def _gluon():
    """The kernel for Hopper; ``None`` where this Triton has another Gluon than it needs."""
    try:
        from . import hopper_kernels as quaternion_linear_gluon
    except (ImportError, AttributeError):
        return None
    return quaternion_linear_gluon


def _specialised(rows: Rows, form: Form, device: Device) -> bool:
    """Whether the kernel for Hopper takes a layer: large, in half precision, all tiles whole."""
    return (
        rows.rows >= 128
        and rows.rows * form.inputs * form.outputs >= 2**25
        and rows.groups == 1
        and form.inputs % 64 == 0
        and form.outputs % 64 == 0
        and not form.rotation
        and form.dtype != torch.float32
        and device.major == 9
        and _gluon() is not None
    )


def _columns(width: int, others: int, device: Device) -> int:
    """The widest tile that divides ``width`` (a multiple of 64) and keeps most programs busy."""
    widths = [n for n in (256, 128, 64) if width % n == 0]
    busy = (n for n in widths if others * (width // n) >= 0.75 * device.multiprocessors)
    return next(busy, widths[-1])


def _copyable(t: Tensor) -> Tensor:
    """A matrix that the bulk copies can read: rows of whole 16 bytes, columns side by side."""
    t = t if t.dim() == 2 else t.view(-1, t.shape[-1])
    if t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.stride(0) and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=4096)
def _product_launch(
    kind, operands, bias_dtype, form, device, sizes, steps=0, splits=1, chunk=0, sums=False
):
    """The kernel for Hopper, for operands of these shapes and row strides; see there."""
    depth, height, width, cols = sizes
    steps = steps or depth // 64
    order, negative, terms = _terms(kind, form.zero_half)
    half_result = form.zero_half and kind == "input"
    first, count = (2, 2) if half_result else (0, 4)
    tiles_m, tiles_n = ceil_div(height, 128), width // cols
    tiles = splits * tiles_m * tiles_n * count
    weights = kind == "weights"
    box = (cols, 64) if kind == "input" else (64, cols)
    # As many tiles on the way as fit beside the two groups' results and the barriers.
    staging = 0 if weights else 2 * 64 * cols * 2
    stages = (device.shared - staging - 1024) // ((128 + cols) * 64 * 2)

    def described(number, shape, row_stride, box):
        return number, gluon_box(shape, box, form.dtype, (row_stride, 1))

    out_width = count * width
    result = form.dtype
    if weights:
        result = form.weight_dtype if splits == 1 else torch.float32
    return Launch(
        _gluon().product_kernel,
        (min(tiles, device.multiprocessors),),
        device,
        (
            order,
            negative,
            first,
            count,
            depth,
            height,
            width,
            steps,
            chunk or steps,
            tiles,
            tiles_m,
            tiles_n,
        ),
        (
            terms,
            2 if terms == 2 else 0,
            kind,
            bias_dtype is not None,
            sums,
            min(6, stages),
            cols,
        ),
        warps=4,
        tensors=(
            described(0, *operands[0], (64, 64)),
            *(
                None if operand is None else described(1 + i, *operand, box)
                for i, operand in enumerate(operands[1:])
            ),
            None if weights else described(5, (height, out_width), out_width, (64, cols)),
            (5, None) if weights else None,
            None if bias_dtype is None else (6, None),
            (7, None) if sums else None,
        ),
        dtypes=(*(form.dtype,) * 5, result, bias_dtype, torch.float32 if sums else None),
    )


def _large_linear(
    x, rows: Rows, weights, bias, out, form, device, back, sums
) -> Callable[[], None]:
    kind = "input" if back else "output"
    if form.weight_dtype != form.dtype:  # autocast
        packed = torch.empty((4, *weights[0].shape), dtype=form.dtype, device=x.device)
        weights = torch.stack(weights, out=packed).unbind()
    bias_dtype, asked = None if bias is None else bias.dtype, sums is not None
    if all(map(_is_packed, (x, *weights))):  # no views, which cost more than the launch
        run = _packed_launch(kind, rows.rows, x.shape[-1], bias_dtype, form, device, asked)
    else:
        x = _copyable(x)
        weights = [_copyable(w.view(w.shape[-2:])) for w in weights]
        operands = tuple([(t.shape, t.stride(0)) for t in (x, *weights)])
        run = _large_launch(kind, operands, bias_dtype, form, device, asked)
    return functools.partial(run, x, *weights, out, bias, sums)


def _is_packed(t: Tensor) -> bool:
    return t.is_contiguous() and t.data_ptr() % 16 == 0


@functools.lru_cache(maxsize=4096)
def _packed_launch(kind, rows: int, width: int, bias_dtype, form: Form, device: Device, sums: bool):
    weight = ((form.inputs, form.outputs), form.outputs)
    operands = (((rows, width), width), *(weight,) * 4)
    return _large_launch(kind, operands, bias_dtype, form, device, sums)


def _large_launch(kind, operands, bias_dtype, form: Form, device: Device, sums: bool):
    depth, width = form.outputs, form.inputs
    count = 2 if form.zero_half else 4
    if kind == "output":
        depth, width, count = form.inputs, form.outputs, 4
    height = operands[0][0][0]
    cols = _columns(width, ceil_div(height, 128) * count, device)
    sizes = (depth, height, width, cols)
    return _product_launch(kind, operands, bias_dtype, form, device, sizes, sums=sums)


def _large_gradients(x, g, g_rows: Rows, dw, db, form, device, sums) -> Callable[[], None]:
    rows, inputs, outputs = g_rows.rows, form.inputs, form.outputs
    steps = ceil_div(rows, 64)
    # Fewer columns mean fewer parts to add, more mean fewer bytes per product.
    cols = _columns(outputs, 10**9 if rows >= 16384 else 4 * ceil_div(inputs, 128), device)
    cols = max(cols, min(128, outputs & -outputs))
    tiles = 4 * ceil_div(inputs, 128) * (outputs // cols)
    splits = max(1, min(steps // 4, device.multiprocessors // tiles))
    pairs = []
    parts = dw
    if splits > 1:
        parts = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
        pairs.append((parts, dw))
    left, right = _copyable(x), _copyable(g)
    run = _product_launch(
        "weights",
        ((left.shape, left.stride(0)), (right.shape, right.stride(0)), None, None, None),
        None,
        form,
        device,
        (rows, inputs, outputs, cols),
        steps=ceil_div(steps, splits),
        splits=splits,
        # So many tiles of all components before the next rows: with the splits all over x and g,
        # they come from memory once and the other times from L2.
        chunk=16 if splits == 1 else 4,
    )
    steps = [functools.partial(run, left, right, None, None, None, parts, None, None)]
    if db is not None:
        if sums is None:
            run, sums_splits = _sums_launch(g_rows, db.numel(), form.dtype, device)
            sums = torch.empty((sums_splits, db.numel()), dtype=torch.float32, device=x.device)
            steps.append(functools.partial(run, g, sums))
        pairs.append((sums, db))
    if pairs:
        steps.append(_reduce(device, *pairs))
    return _sequence(*steps)


@functools.lru_cache(maxsize=4096)
def _sums_launch(g_rows: Rows, width: int, dtype, device: Device) -> tuple[Launch, int]:
    rows, _, row_stride, col_stride = g_rows[1:]
    splits = min(64, ceil_div(rows, 128))
    run = Launch(
        kernels.sums_kernel,
        (ceil_div(width, 64), splits),
        device,
        (rows, width, row_stride, col_stride, ceil_div(rows, splits)),
        (64, 64),
        warps=4,
        dtypes=(dtype, torch.float32),
    )
    return run, splits
