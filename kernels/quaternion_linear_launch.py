"""Launchers of the quaternion kernels: which kernel, with which tiles, for which size."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from fastadapt.kernels import quaternion_linear_triton as kernels
from fastadapt.kernels.launch import Device, block, device_of, gluon_descriptor, launch

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Form:
    """What a layer computes, beside its sizes."""

    rotation: bool
    scale: bool
    zero_half: bool


@dataclass(frozen=True)
class Tile:
    """Launch configuration of one product: its tile, warps, stages, parts of the reduction."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    splits: int = 1


def _splits(tiles: int, steps: int, device: Device, least: int = 1) -> int:
    """Parts of a reduction of ``steps`` tiles, so that all multiprocessors have something to do."""
    return max(least, min(steps, device.multiprocessors // tiles))


@functools.lru_cache(maxsize=4096)
def linear_tile(
    rows: int, depth: int, width: int, groups: int, wide: bool, rotation: bool, device: Device
) -> Tile:
    """The rule for output and gradient of x; ``wide`` means fp32."""
    if wide:  # on the multipliers of single numbers: short, or the operands fill the registers
        tile = Tile(16 if rows <= 16 else 32, 32, 16, 8, 2)
    elif rows <= 16:
        tile = Tile(16, 32, 32 if rotation else 64, 4, 3)
    elif rotation or rows <= 64:
        tile = Tile(64, 32, 32 if rotation else 64, 8, 2)
    else:
        tile = Tile(64, 64, 32, 8, 3)
    tiles = -(-rows // tile.rows) * -(-width // tile.cols) * groups
    splits = min(4, _splits(tiles, -(-depth // tile.depth), device))
    return Tile(tile.rows, tile.cols, tile.depth, tile.warps, tile.stages, splits)


@functools.lru_cache(maxsize=4096)
def gradient_tile(
    rows: int, inputs: int, outputs: int, groups: int, wide: bool, rotation: bool, device: Device
) -> Tile:
    """The rule for gradients of weights: ``depth`` runs over the rows of x."""
    if wide:
        tile = Tile(32, 32, 16, 8, 2)
    elif rotation:
        tile = Tile(64, 32, 32, 8, 2)
    elif rows <= 64:
        tile = Tile(32, 32, min(64, block(rows)), 4, 2)
    else:
        tile = Tile(64, 64, 32, 8, 3)
    tiles = -(-inputs // tile.rows) * -(-outputs // tile.cols) * groups
    splits = min(32, _splits(tiles, -(-rows // (4 * tile.depth)), device))
    return Tile(tile.rows, tile.cols, tile.depth, tile.warps, tile.stages, splits)


def _rows(x: Tensor, groups: int | None) -> tuple[Tensor, int, int, int, int, int]:
    """x as [G, M, width] in memory: itself or a copy, G, M, and its three strides."""
    width = x.shape[-1]
    g = 1 if groups is None else groups
    m = x.numel() // (g * width)
    if x.is_contiguous():
        return x, g, m, m * width, width, 1
    if x.dim() > (2 if groups is None else 3) or x.dim() == 1:
        x = x.reshape(m, width) if groups is None else x.reshape(g, m, width)
    return x, g, m, 0 if groups is None else x.stride(0), x.stride(-2), x.stride(-1)


def forward(x, weights, bias, scale, *, rotation: bool, zero_half: bool) -> Tensor:
    """y [..., 4·O] in x's dtype; arguments as ``quaternion_linear``."""
    *groups, inputs, outputs = weights[0].shape
    y = x.new_empty(*x.shape[:-1], 4 * outputs)
    if y.numel() == 0:
        return y
    x = _rows(x, groups[0] if groups else None)
    form = Form(rotation, scale is not None, zero_half)
    _linear(x, weights, bias, scale, y, inputs, outputs, form, backward=False)
    return y


def backward(g, x, weights, scale, *, rotation, zero_half, need_x, need_w, need_b, bias_dtype):
    """Gradients of ``forward``.

    Returns:
        Of x; of the weights (and the scale, if there is one) as one tensor [4 (5), …]; of the
        bias. ``None`` for what is not needed.
    """
    *groups, inputs, outputs = weights[0].shape
    form = Form(rotation, scale is not None, zero_half)
    kinds = 5 if form.scale else 4
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    new = torch.zeros if x.numel() == 0 else torch.empty  # no rows: nothing will write them
    dw = db = None
    if need_w:
        dw = new((kinds, *weights[0].shape), dtype=weights[0].dtype, device=x.device)
    if need_b:
        db = new((*groups, 4 * outputs), dtype=bias_dtype, device=x.device)
    if x.numel() == 0:
        return dx, dw, db
    g = _rows(g, groups[0] if groups else None)
    if need_x:
        _linear(g, weights, None, scale, dx, outputs, inputs, form, backward=True)
    if need_w or need_b:
        x = _rows(x, groups[0] if groups else None)
        _gradients(x, g, weights, scale, dw, db, inputs, outputs, form)
    return dx, dw, db


def _arguments(x: Tensor, weights, scale, rotation: bool):
    """Contiguous weights, the device, and what all kernels' launches share."""
    weights = [w if w.is_contiguous() else w.contiguous() for w in weights]
    if scale is not None and not scale.is_contiguous():
        scale = scale.contiguous()
    ieee = x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return weights, scale, device_of(x.device.index), "ieee" if ieee else "tf32"


# Hamilton products as sums of terms left[a] @ right[a ^ c]: sign(a, c) of x_a in y_c.
_SIGNS = ((1, 1, 1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1), (-1, 1, -1, 1))


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
        from fastadapt.kernels import quaternion_linear_gluon
    except (ImportError, AttributeError):
        return None
    return quaternion_linear_gluon


def _specialised(rows: int, inputs: int, outputs: int, groups, form: Form, x: Tensor) -> bool:
    """Whether the kernel for Hopper takes a layer: large, in half precision, all tiles whole."""
    return (
        rows >= 512
        and groups == 1
        and inputs % 64 == 0
        and outputs % 64 == 0
        and not form.rotation
        and x.dtype != torch.float32
        and device_of(x.device.index).major == 9
        and _gluon() is not None
    )


def _columns(width: int) -> int:
    """The widest tile that divides ``width``, a multiple of 64."""
    return next(n for n in (256, 128, 64) if width % n == 0)


def _copyable(t: Tensor) -> Tensor:
    """A matrix that the bulk copies can read: rows of whole 16 bytes, columns side by side."""
    t = t.view(-1, t.shape[-1]) if t.dim() != 2 else t
    if t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _packed(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights as the bulk copies read them, in one launch if they need a cast (autocast)."""
    weights = [w.view(w.shape[-2:]) for w in weights]
    if weights[0].dtype != dtype:
        packed = torch.empty((4, *weights[0].shape), dtype=dtype, device=weights[0].device)
        return list(torch.stack(weights, out=packed).unbind())
    return [_copyable(w) for w in weights]


def _product(kind, left, right, out, bias, zero_half, *, depth, height, width, steps, splits=1):
    """Launches the kernel for Hopper; see there."""
    device = device_of(left.device.index)
    cols = _columns(width)
    order, negative, terms = _terms(kind, zero_half)
    half_result = zero_half and kind == "input"
    first, count = (2, 2) if half_result else (0, 4)
    tiles_m, tiles_n = -(-height // 128), width // cols
    tiles = splits * tiles_m * tiles_n * count
    box = [cols, 64] if kind == "input" else [64, cols]
    # As many tiles on the way as fit beside the two groups' results and the barriers.
    staging = 0 if kind == "weights" else 2 * 64 * cols * 2
    stages = (device.shared - staging - 1024) // ((128 + cols) * 64 * 2)
    launch(
        _gluon().product_kernel,
        (min(tiles, device.multiprocessors),),
        device,
        gluon_descriptor(left, [64, 64]),
        *(gluon_descriptor(t, box) for t in right),
        None if kind == "weights" else gluon_descriptor(out, [64, cols]),
        out if kind == "weights" else None,
        bias,
        order,
        negative,
        first,
        count,
        depth,
        height,
        width,
        steps,
        tiles,
        tiles_m,
        tiles_n,
        TERMS=terms,
        SKIPPED=2 if terms == 2 else 0,
        KIND=kind,
        BIAS=bias is not None,
        STAGES=min(6, stages),
        BN=cols,
        pdl=True,
        warps=4,
    )


def _linear(x, weights, bias, scale, out, depth, width, form: Form, *, backward: bool):
    """y = W ⊗ x + bias into ``out``, or backward: dx = W̄ ⊗ g, with x = g."""
    x, groups, rows, x_g, x_m, x_k = x
    weights, scale, device, precision = _arguments(x, weights, scale, form.rotation)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if _specialised(rows, depth, width, groups, form, x):
        _product(
            "input" if backward else "output",
            _copyable(x),
            _packed(weights, x.dtype),
            out.view(rows, -1),
            bias,
            form.zero_half,
            depth=depth,
            height=rows,
            width=width,
            steps=depth // 64,
        )
        return
    wide = x.dtype == torch.float32
    tile = linear_tile(rows, depth, width, groups, wide, form.rotation, device)
    parts = out
    if tile.splits > 1:
        parts = torch.empty((tile.splits, out.numel()), dtype=torch.float32, device=x.device)
    launch(
        kernels.linear_kernel,
        (-(-rows // tile.rows) * -(-width // tile.cols), tile.splits, groups),
        device,
        x,
        *weights,
        scale,
        bias,
        parts,
        rows,
        depth,
        width,
        x_g,
        x_m,
        x_k,
        _part(depth, tile),
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        BACKWARD=backward,
        ROTATION=form.rotation,
        SCALE=form.scale,
        BIAS=bias is not None,
        IN_HALF=form.zero_half and not backward,
        OUT_HALF=form.zero_half and backward,
        dtype=_DTYPES[x.dtype],
        PRECISION=precision,
        pdl=device.major >= 9,
        warps=tile.warps,
        stages=tile.stages,
    )
    if tile.splits > 1:
        _reduce((parts, out), None, device)


def _gradients(x, g, weights, scale, dw, db, inputs, outputs, form: Form):
    """dW = g ⊗ x̄ and the bias's gradient, summed over all rows."""
    x, groups, rows, x_g, x_m, x_i = x
    g, _, _, g_g, g_m, g_o = g
    weights, scale, device, precision = _arguments(x, weights, scale, form.rotation)
    if dw is not None and _specialised(rows, inputs, outputs, groups, form, x):
        _large_gradients(x, g, dw, db, rows, inputs, outputs, g_m, g_o, form.zero_half)
        return
    wide = x.dtype == torch.float32
    inputs_tiled = inputs if dw is not None else 1  # for the bias alone, one tile of them
    tile = gradient_tile(rows, inputs_tiled, outputs, groups, wide, form.rotation, device)
    dw_parts, db_parts = dw, db
    if tile.splits > 1:
        if dw is not None:
            dw_parts = dw.new_empty(tile.splits, dw.numel(), dtype=torch.float32)
        if db is not None:
            db_parts = db.new_empty(tile.splits, db.numel(), dtype=torch.float32)
    launch(
        kernels.gradient_kernel,
        (-(-inputs_tiled // tile.rows) * -(-outputs // tile.cols), tile.splits, groups),
        device,
        x,
        g,
        *weights,
        scale,
        dw_parts,
        db_parts,
        rows,
        inputs,
        outputs,
        x_g,
        x_m,
        x_i,
        g_g,
        g_m,
        g_o,
        _part(rows, tile),
        BM=tile.depth,
        BI=tile.rows,
        BO=tile.cols,
        ROTATION=form.rotation,
        SCALE=form.scale,
        HALF=form.zero_half,
        WEIGHTS=dw is not None,
        BIAS=db is not None,
        dtype=_DTYPES[x.dtype],
        PRECISION=precision,
        pdl=device.major >= 9,
        warps=tile.warps,
        stages=tile.stages,
    )
    if tile.splits > 1:
        pairs = [(parts, out) for parts, out in ((dw_parts, dw), (db_parts, db)) if out is not None]
        _reduce(pairs[0], pairs[1] if len(pairs) == 2 else None, device)


def _large_gradients(x, g, dw, db, rows, inputs, outputs, g_m, g_o, zero_half):
    """The same with the kernel for Hopper."""
    device = device_of(x.device.index)
    tiles = 4 * -(-inputs // 128) * (outputs // _columns(outputs))
    steps = -(-rows // 64)
    splits = max(1, min(steps // 8, device.multiprocessors // tiles))
    steps = -(-steps // splits)
    dw_parts = dw if splits == 1 else dw.new_empty(splits, dw.numel(), dtype=torch.float32)
    _product(
        "weights",
        _copyable(x),
        [_copyable(g)] * 4,
        dw_parts,
        None,
        zero_half,
        depth=rows,
        height=inputs,
        width=outputs,
        steps=steps,
        splits=splits,
    )
    pairs = [] if splits == 1 else [(dw_parts, dw)]
    if db is not None:
        columns, parts = 64, min(64, -(-rows // 128))
        sums = db.new_empty(parts, db.numel(), dtype=torch.float32)
        launch(
            kernels.sums_kernel,
            (-(-db.numel() // columns), parts),
            device,
            g,
            sums,
            rows,
            db.numel(),
            g_m,
            g_o,
            -(-rows // parts),
            BM=64,
            BN=columns,
            pdl=True,
            warps=4,
        )
        pairs.append((sums, db))
    if pairs:
        _reduce(pairs[0], pairs[1] if len(pairs) == 2 else None, device)


def _part(size: int, tile: Tile) -> int:
    """How much of a reduction over ``size`` one split does: whole tiles."""
    return -(-size // (tile.splits * tile.depth)) * tile.depth


def _reduce(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor] | None, device: Device) -> None:
    """Sums parts [splits, count] to results [count], of one or two at once."""
    block_size = 1024
    a_parts, a_out = a
    b_parts, b_out = (None, None) if b is None else b
    a_count, b_count = a_out.numel(), 0 if b is None else b_out.numel()
    launch(
        kernels.reduce_kernel,
        (-(-a_count // block_size) + -(-b_count // block_size),),
        device,
        a_parts,
        a_out,
        b_parts,
        b_out,
        a_count,
        b_count,
        a_parts.shape[0],
        1 if b is None else b_parts.shape[0],
        BLOCK=block_size,
        pdl=device.major >= 9,
        warps=4,
    )
