"""The launches of cluster attention's kernels, each prepared for a size: shapes, tiles, outputs.

All take sizes, dtypes and a configuration once, and then tensors, contiguous and aligned to 16
bytes. ``rows`` are all tokens of all samples. Widths and ranks are multiples of 8 where a kernel
copies in bulk (see ``cluster_attention_passes``).
"""

from __future__ import annotations

import torch

from ..common.arithmetic import ceil_div
from ..common.launcher import Box, Launch, block, gluon_box, new
from . import triton_kernels as kernels
from .config import Config, Tile, hopper_kernels, slots_of

_SHARED = 231_000  # bytes of Hopper's shared memory for tiles, barriers set aside


def _nothing() -> None:
    """Makes an output that nobody asked for."""


def _launch(
    kernel, grid, config: Config, dtypes, tensors, numbers, constants, *, warps, stages=3
) -> Launch:
    return Launch(
        kernel,
        grid,
        config.device,
        numbers,
        tuple(constants.values()),
        warps=warps,
        stages=stages,
        tensors=tensors,
        dtypes=dtypes,
    )


def _pointer(number: int, present=True) -> tuple[int, None] | None:
    return (number, None) if present else None


def _described(number: int, box: Box, present=True) -> tuple[int, Box] | None:
    return (number, box) if present else None


def _row_tile(number: int, tile: Tile, shape: tuple[int, ...], cols: int, present=True):
    """A matrix, or one for each sample, as the kernels' row tiles see it: twice, in two heights."""
    ones = (1,) * (len(shape) - 2)
    return (
        _described(number, Box(shape, (*ones, tile.rows, cols)), present),
        _described(
            number, Box(shape, (*ones, tile.extra_rows, cols)), present and tile.extra_rows > 0
        ),
    )


def project(rows, tokens, width, rank, dtype, config: Config, **options):
    """x [rows, C] times a weight, by Hopper's own kernel where the configuration has one."""
    kind = HopperProject if config.groups else Project
    return kind(rows, tokens, width, rank, dtype, config, **options)


class Project:
    """out = x @ weightᵀ + bias, and if asked for out @ T_bᵀ and column sums.

    Args:
        rows: of x.
        tokens: rows of a sample in the sums of x.
        transposed: the weight is [C, R], else [R, C].
        bias: its dtype, [R]; ``None`` for none.
        sums: of x over each tile, by sample.
        mix: also out @ T_bᵀ, for so many samples.
        mixed_sums: of out @ T_bᵀ over each tile.

    Called with x, weight, bias and T_b [B, R, R]; ``None`` for what there is not. Returns out and
    out @ T_bᵀ [rows, R], the sums of x as [tiles, slots, C] and of out @ T_bᵀ as [tiles, R], fp32;
    ``None`` for what is not asked for. ``tile_rows`` is the height of the sums' tiles;
    ``sum_rows`` and ``mixed_sum_rows`` tell how many of them hold any rows.
    """

    def __init__(
        self,
        rows,
        tokens,
        width,
        rank,
        dtype,
        config: Config,
        *,
        transposed=False,
        bias: torch.dtype | None = None,
        sums=False,
        mix=0,
        mixed_sums=False,
    ):
        tile = config.project
        tiles = ceil_div(rows, tile.all_rows)
        slots = slots_of(tile.all_rows, rows, tokens)
        self.tile_rows, self.slots = tile.all_rows, slots
        self.sum_rows, self.mixed_sum_rows = tiles, ceil_div(rows, config.transform.all_rows)
        self.new_out = new((rows, rank), dtype, config.device)
        shape = (tiles, slots, width)
        self.new_sums = new(shape, torch.float32, config.device) if sums else _nothing
        self.run = _launch(
            kernels.project_kernel,
            (tiles, ceil_div(rank, tile.cols)),
            config,
            (dtype, dtype, dtype, bias, torch.float32),
            (
                *_row_tile(0, tile, (rows, width), tile.depth),
                _described(
                    1,
                    Box((width, rank), (tile.depth, tile.cols))
                    if transposed
                    else Box((rank, width), (tile.cols, tile.depth)),
                ),
                *_row_tile(2, tile, (rows, rank), tile.cols),
                _pointer(3, bias is not None),
                _pointer(4, sums),
            ),
            (rows, width, rank, tokens, slots),
            {
                "BM0": tile.rows,
                "BM1": tile.extra_rows,
                "BN": tile.cols,
                "BK": tile.depth,
                "BS": block(slots),
                "TRANSPOSED": transposed,
                "BIAS": bias is not None,
                "SUMS": sums,
            },
            warps=tile.warps,
            stages=tile.stages,
        )
        self.mix = None
        if mix:
            self.mix = Transform(
                mix,
                rows // mix,
                rank,
                0,
                dtype,
                config,
                t_transposed=True,
                store_z=True,
                sums=mixed_sums,
            )

    def __call__(self, x, weight, bias, mixed):
        out = self.new_out()
        sums = self.new_sums()
        self.run(x, weight, out, bias, sums)
        if self.mix is None:
            return out, None, sums, None
        _, out_mixed, out_sums = self.mix(out, mixed, None, None)
        return out, out_mixed, sums, out_sums


class HopperProject:
    """The same in one launch, by Hopper's own kernel; sums are over blocks of 64 rows.

    The last program's blocks may lie beyond the rows: they have no sums.
    """

    tile_rows = 64

    def __init__(
        self,
        rows,
        tokens,
        width,
        rank,
        dtype,
        config: Config,
        *,
        transposed=False,
        bias: torch.dtype | None = None,
        sums=False,
        mix=0,
        mixed_sums=False,
    ):
        groups, device = config.groups, config.device
        tiles = ceil_div(rows, 64 * groups)
        slots = self.slots = slots_of(64, rows, tokens)
        self.sum_rows, self.mixed_sum_rows = ceil_div(rows, 64), tiles * groups
        self.new_out = new((rows, rank), dtype, device)
        self.new_mixed = self.new_out if mix else _nothing
        blocks = tiles * groups
        self.new_sums = new((blocks, slots, width), torch.float32, device) if sums else _nothing
        shape = (blocks, rank)
        self.new_mixed_sums = new(shape, torch.float32, device) if mixed_sums else _nothing
        gluon = hopper_kernels()
        weight = (width, rank) if transposed else (rank, width)
        out = gluon_box((rows, rank), (64, 64), dtype)
        self.run = _launch(
            gluon.project_kernel,
            (tiles,),
            config,
            (*(dtype,) * 5, bias, torch.float32, torch.float32),
            (
                _described(0, gluon_box((rows, width), (64, 64), dtype)),
                _described(1, gluon_box(weight, (64, rank) if transposed else (rank, 64), dtype)),
                _described(2, gluon_box((mix * rank, rank), (64, rank), dtype), mix > 0),
                _described(3, out),
                _described(4, out, mix > 0),
                _pointer(5, bias is not None),
                _pointer(6, sums),
                _pointer(7, mixed_sums),
            ),
            (rows, width, tokens, slots, rows // mix if mix else 1),
            {
                "v": gluon.Project(
                    rank=rank,
                    groups=groups,
                    stages=min(6, (_SHARED - 12_000) // ((64 * groups + rank) * 128)),
                    slots=8 if slots <= 8 else 16,
                    transposed=transposed,
                    bias=bias is not None,
                    sums=sums,
                    mix=bool(mix),
                    mixed_sums=mixed_sums,
                )
            },
            warps=4,
        )

    def __call__(self, x, weight, bias, mixed):
        out = self.new_out()
        out_mixed = self.new_mixed()
        sums = self.new_sums()
        out_sums = self.new_mixed_sums()
        self.run(x, weight, mixed, out, out_mixed, bias, sums, out_sums)
        return out, out_mixed, sums, out_sums


def transform(batch, tokens, rank, width, dtype, config: Config, **options):
    """h [rows, R] through T_b and a weight, by Hopper's own kernel where there is one."""
    kind = HopperTransform if config.groups and width else Transform
    return kind(batch, tokens, rank, width, dtype, config, **options)


class Transform:
    """z = h @ T_b (or T_bᵀ), then y = z @ weightᵀ (or weight) + bias, each part if asked for.

    Args:
        width: C, 0 for no y.
        mix: else z = h.
        t_transposed: z = h @ T_bᵀ.
        store_z: z is asked for.
        w_transposed: the weight is [R, C], else [C, R].
        bias: its dtype, [C], or with ``row_bias`` one row for each sample, [B, C]; ``None`` for
            none.
        sums: also the column sums of z over each row tile.

    Called with h [rows, R], T_b [B, R, R], weight and bias; ``None`` for what there is not.
    Returns y [B, N, C], z [rows, R] and the sums [tiles, R], fp32; ``None`` for what is not asked
    for.
    """

    def __init__(
        self,
        batch,
        tokens,
        rank,
        width,
        dtype,
        config: Config,
        *,
        mix=True,
        t_transposed=False,
        store_z=False,
        w_transposed=False,
        bias: torch.dtype | None = None,
        row_bias=False,
        sums=False,
    ):
        rows = batch * tokens
        tile = config.transform if mix else config.expand
        block_rank = block(rank)
        tiles = ceil_div(rows, tile.all_rows)
        cols, parts = 0, 1
        if width:
            # Few row tiles: several programs share the columns of one.
            parts = max(1, min(ceil_div(width, tile.cols), config.device.multiprocessors // tiles))
            cols = tile.cols * ceil_div(width, tile.cols * parts)
            parts = ceil_div(width, cols)
        depth = min(tile.depth, block_rank)
        device = config.device
        self.new_y = new((batch, tokens, width), dtype, device) if width else _nothing
        self.new_z = new((rows, rank), dtype, device) if store_z else _nothing
        self.new_sums = new((tiles, rank), torch.float32, device) if sums else _nothing
        self.run = _launch(
            kernels.transform_kernel,
            (tiles, parts),
            config,
            (*(dtype,) * 5, bias, torch.float32),
            (
                *(
                    _row_tile(0, tile, (batch, tokens, rank), depth)
                    if mix
                    else _row_tile(0, tile, (rows, rank), block_rank)
                ),
                _described(
                    1,
                    Box(
                        (batch, rank, rank),
                        (1, block_rank, depth) if t_transposed else (1, depth, block_rank),
                    ),
                    mix,
                ),
                _described(
                    2,
                    Box((rank, width), (block_rank, tile.cols))
                    if w_transposed
                    else Box((width, rank), (tile.cols, block_rank)),
                    width > 0,
                ),
                *_row_tile(3, tile, (rows, rank), block_rank, store_z),
                *_row_tile(4, tile, (rows, width), tile.cols, width > 0),
                _pointer(5, bias is not None),
                _pointer(6, sums),
            ),
            (rows, tokens, rank, width, cols),
            {
                "BM0": tile.rows,
                "BM1": tile.extra_rows,
                "BR": block_rank,
                "BK": depth,
                "BC": tile.cols,
                "BS": block(slots_of(tile.all_rows, rows, tokens)),
                "MIX": mix,
                "T_TRANSPOSED": t_transposed,
                "STORE_Z": store_z,
                "UP": width > 0,
                "W_TRANSPOSED": w_transposed,
                "BIAS": bias is not None and not row_bias,
                "ROW_BIAS": row_bias,
                "SUMS": sums,
                "PREFETCH": width > 0 and cols == tile.cols,
            },
            warps=tile.warps,
            stages=tile.stages,
        )

    def __call__(self, h, mixed, weight, bias):
        z = self.new_z()
        y = self.new_y()
        sums = self.new_sums()
        self.run(h, mixed, weight, z, y, bias, sums)
        return y, z, sums


class HopperTransform:
    """The same with y by Hopper's own kernel, without sums of z."""

    def __init__(
        self,
        batch,
        tokens,
        rank,
        width,
        dtype,
        config: Config,
        *,
        mix=True,
        store_z=False,
        w_transposed=False,
        bias: torch.dtype | None = None,
        row_bias=False,
    ):
        rows = batch * tokens
        groups = config.groups
        biases = 0 if bias is None else groups if row_bias else 1
        slot = rank * 128 + biases * 2048  # bytes of the ring's slots
        aligned = mix and config.aligned
        units = batch if aligned else ceil_div(rows, 64)
        self.dtype = dtype
        self.new_y = new((batch, tokens, width), dtype, config.device)
        self.new_z = new((rows, rank), dtype, config.device) if store_z else _nothing
        gluon = hopper_kernels()
        weight = (rank, width) if w_transposed else (width, rank)

        def out(cols: int) -> Box:
            if aligned:
                return gluon_box((batch, tokens, cols), (1, 64, 64), dtype)
            return gluon_box((rows, cols), (64, 64), dtype)

        self.run = _launch(
            gluon.transform_kernel,
            (ceil_div(units, groups),),
            config,
            (dtype,) * 6,
            (
                _described(0, gluon_box((rows, rank), (64, 64), dtype)),
                _described(1, gluon_box((batch * rank, rank), (rank, 64), dtype), mix),
                _described(2, gluon_box(weight, (rank, 64) if w_transposed else (64, rank), dtype)),
                _described(3, out(rank), store_z),
                _described(4, out(width)),
                _described(
                    5, gluon_box((batch if row_bias else 1, width), (16, 64), dtype), biases > 0
                ),
            ),
            (rows, tokens, width),
            {
                "v": gluon.Transform(
                    rank=rank,
                    groups=groups,
                    stages=min(6, (_SHARED - groups * rank * 128) // slot),
                    mix=mix,
                    store_z=store_z,
                    w_transposed=w_transposed,
                    biases=biases,
                    row_bias=row_bias,
                    aligned=aligned,
                )
            },
            warps=4,
        )

    def __call__(self, h, mixed, weight, bias):
        if bias is not None and bias.dtype != self.dtype:
            bias = bias.to(self.dtype)
        z = self.new_z()
        y = self.new_y()
        self.run(h, mixed, weight, z, y, bias)
        return y, z, None


class Attend:
    """Token sums and centers to the packed state, fp32: a, s, q, |q|, |centers|.

    Args:
        dtype: of the centers.
        tile_rows, slots: of the sums [tiles, slots, C].
    """

    def __init__(self, batch, tokens, width, num_centers, dtype, tile_rows, slots, config: Config):
        size = batch * (2 * num_centers + width + 1) + num_centers
        self.new_state = new((size,), torch.float32, config.device)
        block_k = block(num_centers)
        # More samples than multiprocessors: leave room for several programs on each.
        crowded = batch > config.device.multiprocessors
        block_c = min(block(width), (16384 if crowded else 32768) // block_k)
        self.run = _launch(
            kernels.attend_kernel,
            (batch,),
            config,
            (torch.float32, dtype, torch.float32),
            tuple(map(_pointer, range(3))),
            (batch, tokens, width, tile_rows, slots),
            {
                "num_centers": num_centers,
                "BC": block_c,
                "BK": block_k,
                "BT": min(8, block((tokens - 2) // tile_rows + 2, 1)),
                "ONE_BLOCK": block_c >= width,
            },
            warps=4 if crowded else 8,
        )

    def __call__(self, sums, centers):
        state = self.new_state()
        self.run(sums, centers, state)
        return state


class Mix:
    """T_b [B, R, R] in ``dtype`` from a [B, K], where the state begins, and the transforms."""

    def __init__(self, batch, num_centers, rank, dtype, transforms_dtype, config: Config):
        size = rank * rank
        self.new_mixed = new((batch, rank, rank), dtype, config.device)
        # With few samples and many centers, Triton 3.6 gave NaN from a tile of 16 (fp16, 128
        # centers).
        bb = min(64, block(batch)) if num_centers <= 32 else 64
        bs = 64
        if dtype != torch.float32:
            bs = 512 if bb == 16 else 256
        self.run = _launch(
            kernels.mix_kernel,
            (ceil_div(size, bs), ceil_div(batch, bb)),
            config,
            (torch.float32, transforms_dtype, dtype),
            (*map(_pointer, range(3)), _whole_rows(2, (batch, size), (bb, bs), dtype)),
            (batch, num_centers, size),
            {"BB": bb, "BK": block(num_centers), "BS": bs},
            warps=4,
        )

    def __call__(self, state, transforms):
        mixed = self.new_mixed()
        self.run(state, transforms, mixed)
        return mixed


def _whole_rows(number: int, shape: tuple[int, int], box: tuple[int, int], dtype: torch.dtype):
    """A descriptor where the bulk copies can take the rows: of whole 16 bytes."""
    return _described(number, Box(shape, box), shape[1] * dtype.itemsize % 16 == 0)


class Outer:
    """hᵀ @ g for each sample: [B, R, R] in their dtype."""

    def __init__(self, batch, tokens, rank, dtype, config: Config):
        tile = config.outer
        depth = min(tile.depth, block(tokens))
        tiles_j = ceil_div(rank, tile.cols)
        self.new_out = new((batch, rank, rank), dtype, config.device)
        self.run = _launch(
            kernels.outer_kernel,
            (ceil_div(rank, tile.rows) * tiles_j, batch),
            config,
            (dtype,) * 3,
            (
                _described(0, Box((batch, tokens, rank), (1, depth, tile.rows))),
                _described(1, Box((batch, tokens, rank), (1, depth, tile.cols))),
                _described(2, Box((batch, rank, rank), (1, tile.rows, tile.cols))),
            ),
            (tokens, tiles_j),
            {"BI": tile.rows, "BJ": tile.cols, "BK": depth},
            warps=tile.warps,
            stages=tile.stages,
        )

    def __call__(self, h, g):
        out = self.new_out()
        self.run(h, g, out)
        return out


class Unmix:
    """Gradients of ``mix``: dtransforms (their dtype), and da as [programs, B, K] fp32 sums.

    Args:
        dtype: of the mixed transforms' gradient.
        transforms_dtype: of the transforms.
        need_t, need_a: their gradient is asked for, and da.
    """

    def __init__(
        self, batch, num_centers, rank, dtype, transforms_dtype, config: Config, *, need_t, need_a
    ):
        size = rank * rank
        bs = config.unmix_cols if dtype != torch.float32 else 64
        # The partial sums of da stay under 64 MB; more samples or centers get fewer programs.
        self.programs = min(ceil_div(size, bs), max(16, (1 << 24) // (batch * num_centers)))
        rows = config.unmix_rows if dtype != torch.float32 else 32
        bb = min(rows, block(batch)) if num_centers <= 32 else rows
        device = config.device
        shape = (num_centers, rank, rank)
        self.new_transforms = new(shape, transforms_dtype, device) if need_t else _nothing
        shape = (self.programs, batch, num_centers)
        self.new_da = new(shape, torch.float32, device) if need_a else _nothing
        self.run = _launch(
            kernels.unmix_kernel,
            (self.programs,),
            config,
            (dtype, torch.float32, transforms_dtype, transforms_dtype, torch.float32),
            (
                _pointer(0),
                _whole_rows(0, (batch, size), (bb, bs), dtype),
                _pointer(1),
                _pointer(2),
                _pointer(3, need_t),
                _pointer(4, need_a),
            ),
            (batch, num_centers, size),
            {
                "BB": bb,
                "BK": block(num_centers),
                "BS": bs,
                "NEED_T": need_t,
                "NEED_A": need_a,
            },
            warps=4,
        )

    def __call__(self, d_mixed, state, transforms):
        d_transforms = self.new_transforms()
        da = self.new_da()
        self.run(d_mixed, state, transforms, d_transforms, da)
        return d_transforms, da


class Unattend:
    """Gradients of ``attend``: ds [B, K] fp32, and dq / N [B, C] (``None`` unless ``need_x``).

    Args:
        programs: parts that da [programs, B, K] comes in.
        dtype: of dq.
        centers_dtype: of the centers.
    """

    def __init__(
        self,
        programs,
        batch,
        tokens,
        width,
        num_centers,
        dtype,
        centers_dtype,
        config: Config,
        *,
        need_x,
    ):
        block_k = block(num_centers)
        block_c = max(16, min(block(width), 32768 // block_k))
        self.new_ds = new((batch, num_centers), torch.float32, config.device)
        self.new_dq = new((batch, width), dtype, config.device) if need_x else _nothing
        self.run = _launch(
            kernels.unattend_kernel,
            (batch,),
            config,
            (torch.float32, torch.float32, centers_dtype, torch.float32, dtype),
            (*map(_pointer, range(4)), _pointer(4, need_x)),
            (programs, batch, tokens, width),
            {
                "num_centers": num_centers,
                "BP": min(block(programs), 8192 // block_k),
                "BC": block_c,
                "BK": block_k,
                "NEED_X": need_x,
                "ONE_BLOCK": block_c >= width,
            },
            warps=8,
        )

    def __call__(self, da, state, centers):
        ds = self.new_ds()
        dq = self.new_dq()
        self.run(da, state, centers, ds, dq)
        return ds, dq


class Reduce:
    """The last sums, over samples and tiles: gradients of the centers [C, K] and of the biases.

    Args:
        rank: of the down projection, whose bias is [R].
        centers_dtype: of the centers.
        dtypes: of the centers', the up and the down bias's gradient; ``None`` for those that are
            not asked for.
        up_rows, down_rows: how many rows the biases' partial sums have, [rows, C] and [rows, R].
    """

    def __init__(
        self,
        batch,
        width,
        num_centers,
        rank,
        centers_dtype,
        dtypes,
        config: Config,
        *,
        up_rows=0,
        down_rows=0,
    ):
        bc = 32
        shapes = ((width, num_centers), (width,), (rank,))
        programs = [
            0 if dtype is None else ceil_div(shape[0], bc)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        self.new_centers, self.new_up, self.new_down = (
            _nothing if dtype is None else new(shape, dtype, config.device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        need_centers, need_up, need_down = (dtype is not None for dtype in dtypes)
        self.run = _launch(
            kernels.reduce_kernel,
            (sum(programs),),
            config,
            (
                *(torch.float32, torch.float32, centers_dtype),
                *(dtypes[0], torch.float32, dtypes[1], torch.float32, dtypes[2]),
            ),
            (
                _pointer(0, need_centers),
                _pointer(1),
                _pointer(2),
                _pointer(3, need_centers),
                _pointer(4, need_up),
                _pointer(5, need_up),
                _pointer(6, need_down),
                _pointer(7, need_down),
            ),
            (batch, width, rank if need_down else 0, up_rows, down_rows, *programs[:2]),
            {
                "num_centers": num_centers,
                "BB": max(32, min(block(batch), 4096 // block(num_centers))),
                "BC": bc,
                "BK": block(num_centers),
                "NEED_CENTERS": need_centers,
                "NEED_UP": need_up,
                "NEED_DOWN": need_down,
            },
            warps=8,
        )

    def __call__(self, ds, state, centers, up_sums, down_sums):
        d_centers, d_up, d_down = self.new_centers(), self.new_up(), self.new_down()
        self.run(ds, state, centers, d_centers, up_sums, d_up, down_sums, d_down)
        return d_centers, d_up, d_down
