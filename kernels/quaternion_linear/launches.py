"""Forward and backward of a quaternion layer: which kernels, in which order.

Hopper's kernel takes large layers (:mod:`.launches_hopper`), the plain ones take all others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, device_of
from . import launches_hopper
from .block_sizes import depth_per_split, gradient_tile, linear_tile
from .form import Form, GroupLayout, form_of, grouped
from .launches_sums import Reduction, Step, sequence, sum_partials
from .triton_backward import weight_gradient_kernel
from .triton_forward import linear_kernel

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    *,
    rotation: bool,
    zero_half: bool,
) -> Tensor:
    """Compute y [..., 4·O] in x's dtype; arguments as for ``quaternion_linear``."""
    form = form_of(x, weights, scale, rotation, zero_half)
    y = torch.empty((*x.shape[:-1], 4 * form.outputs), dtype=x.dtype, device=x.device)
    if y.numel():
        x, layout = grouped(x, form.groups)
        weights = [_contiguous(w) for w in weights]
        _linear(x, layout, weights, _optional(bias), _optional(scale), y, form)()
    return y


def backward(
    g: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    scale: Tensor | None,
    *,
    rotation: bool,
    zero_half: bool,
    need_x: bool,
    need_w: bool,
    need_b: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of :func:`forward`.

    Args:
        g: gradient of y.
        need_x, need_w, need_b: which of the three results are needed.
        bias_dtype: of the bias's gradient.

    Returns:
        The gradient of x; of the weights (and the scale, if there is one) as one tensor
        [4 (5), …]; of the bias. ``None`` for what is not needed.
    """
    form = form_of(x, weights, scale, rotation, zero_half)
    device, shape = x.device, weights[0].shape
    # Without rows, no kernel will write them.
    new = torch.empty if x.numel() else torch.zeros
    dx = torch.empty(x.shape, dtype=x.dtype, device=device) if need_x else None
    dw = db = None
    if need_w:
        dw = new((5 if form.scale else 4, *shape), dtype=form.weight_dtype, device=device)
    if need_b:
        db = new((*shape[:-2], 4 * form.outputs), dtype=bias_dtype, device=device)
    if x.numel() == 0:
        return dx, dw, db
    g, g_layout = grouped(g, form.groups)
    weights, scale = [_contiguous(w) for w in weights], _optional(scale)
    # All launches are prepared before any runs: their kernels compile side by side.
    steps = []
    sums = None
    if dx is not None:
        if dw is not None and db is not None:
            # Hopper's kernel of dx reads all of g, and sums its columns.
            sums = launches_hopper.new_sums(g_layout, db, form, device_of(device.index))
        steps.append(_linear(g, g_layout, weights, None, scale, dx, form, backward=True, sums=sums))
    if dw is not None or db is not None:
        x, x_layout = grouped(x, form.groups)
        steps.append(_gradients(x, x_layout, g, g_layout, weights, scale, dw, db, form, sums=sums))
    for run in steps:
        run()
    return dx, dw, db


def _contiguous(t: Tensor) -> Tensor:
    return t if t.is_contiguous() else t.contiguous()


def _optional(t: Tensor | None) -> Tensor | None:
    return t if t is None else _contiguous(t)


def _linear(
    x: Tensor,
    layout: GroupLayout,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    form: Form,
    *,
    backward: bool = False,
    sums: Tensor | None = None,
) -> Step:
    """Prepare y = W ⊗ x + bias in ``out``; backward dx = W̄ ⊗ g, with x = g.

    Args:
        sums: gets the sums of g over blocks of 64 rows, where Hopper's kernel takes the layer.
    """
    device = device_of(x.device.index)
    if launches_hopper.takes(layout, form, device):
        return launches_hopper.linear(
            x, layout, weights, bias, out, form, device, backward=backward, sums=sums
        )
    bias_dtype = None if bias is None else bias.dtype
    launch, splits = _linear_launch(layout, bias_dtype, form, device, backward)
    if splits == 1:
        return functools.partial(launch, x, *weights, scale, bias, out)
    partials = torch.empty((splits, out.numel()), dtype=torch.float32, device=x.device)
    first = functools.partial(launch, x, *weights, scale, bias, partials)
    return sequence(first, sum_partials(device, Reduction(partials, out)))


@functools.lru_cache(maxsize=4096)
def _linear_launch(
    layout: GroupLayout,
    bias_dtype: torch.dtype | None,
    form: Form,
    device: Device,
    backward: bool,
) -> tuple[Launch, int]:
    """Prepare the kernel, and count the splits of the reduction."""
    depth, width = (form.outputs, form.inputs) if backward else (form.inputs, form.outputs)
    tile = linear_tile(layout.rows, depth, width, layout.groups, form, device)
    launch = Launch(
        linear_kernel,
        (
            ceil_div(layout.rows, tile.rows) * ceil_div(width, tile.cols),
            tile.splits,
            layout.groups,
        ),
        device,
        (
            layout.rows,
            depth,
            width,
            layout.group_stride,
            layout.row_stride,
            layout.col_stride,
            depth_per_split(depth, tile),
        ),
        (
            tile.rows,
            tile.cols,
            tile.depth,
            backward,
            form.rotation,
            form.scale,
            bias_dtype is not None,
            form.zero_half and not backward,
            form.zero_half and backward,
            _TRITON_DTYPES[form.dtype],
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
    return launch, tile.splits


def _weight_dtypes(form: Form) -> tuple[torch.dtype | None, ...]:
    """List the dtypes of the four weights and the scale, for the launch."""
    return *(form.weight_dtype,) * 4, form.weight_dtype if form.scale else None


def _gradients(
    x: Tensor,
    x_layout: GroupLayout,
    g: Tensor,
    g_layout: GroupLayout,
    weights: Sequence[Tensor],
    scale: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    form: Form,
    *,
    sums: Tensor | None,
) -> Step:
    """Prepare dW = g ⊗ x̄ and the bias's gradient, summed over all rows, or from ``sums``."""
    device = device_of(x.device.index)
    if dw is not None and launches_hopper.takes(x_layout, form, device):
        return launches_hopper.gradients(x, g, g_layout, dw, db, form, device, sums=sums)
    bias_dtype = None if db is None else db.dtype
    launch, splits = _gradient_launch(x_layout, g_layout, dw is not None, bias_dtype, form, device)
    if splits == 1:
        return functools.partial(launch, x, g, *weights, scale, dw, db)

    def reduction(out: Tensor | None) -> Reduction | None:
        if out is None:
            return None
        partials = torch.empty((splits, out.numel()), dtype=torch.float32, device=x.device)
        return Reduction(partials, out)

    dw_sum, db_sum = reduction(dw), reduction(db)
    first = functools.partial(launch, x, g, *weights, scale, *map(_partials, (dw_sum, db_sum)))
    return sequence(first, sum_partials(device, *_present((dw_sum, db_sum))))


def _partials(reduction: Reduction | None) -> Tensor | None:
    return None if reduction is None else reduction.partials


def _present(reductions: Iterable[Reduction | None]) -> list[Reduction]:
    return [reduction for reduction in reductions if reduction is not None]


@functools.lru_cache(maxsize=4096)
def _gradient_launch(
    x_layout: GroupLayout,
    g_layout: GroupLayout,
    need_w: bool,
    bias_dtype: torch.dtype | None,
    form: Form,
    device: Device,
) -> tuple[Launch, int]:
    """Prepare the kernel, and count the splits of the rows."""
    inputs = form.inputs if need_w else 1  # for the bias alone, one tile of them
    rows = x_layout.rows
    tile = gradient_tile(rows, inputs, form.outputs, x_layout.groups, form, device)
    tiles = ceil_div(inputs, tile.rows) * ceil_div(form.outputs, tile.cols)
    results = [form.weight_dtype if need_w else None, bias_dtype]
    if tile.splits > 1:
        results = [dtype and torch.float32 for dtype in results]
    launch = Launch(
        weight_gradient_kernel,
        (tiles, tile.splits, x_layout.groups),
        device,
        (
            rows,
            form.inputs,
            form.outputs,
            x_layout.group_stride,
            x_layout.row_stride,
            x_layout.col_stride,
            g_layout.group_stride,
            g_layout.row_stride,
            g_layout.col_stride,
            depth_per_split(rows, tile),
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
            _TRITON_DTYPES[form.dtype],
            "ieee" if form.ieee else "tf32",
        ),
        warps=tile.warps,
        stages=tile.stages,
        dtypes=(form.dtype, form.dtype, *_weight_dtypes(form), *results),
    )
    return launch, tile.splits
