"""Launchers of the cluster attention kernels, and the forward and backward made of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.kernels import cluster_attention_triton as kernels
from fastadapt.kernels import tuning
from fastadapt.kernels.launch import (
    Descriptor,
    Device,
    block,
    device_of,
    gluon_descriptor,
    launch,
)


@dataclass(frozen=True)
class Tile:
    """Launch configuration of one kernel: rows (in two parts), columns, depth; warps, stages."""

    rows: int
    extra_rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    @property
    def all_rows(self) -> int:
        return self.rows + self.extra_rows


@dataclass(frozen=True)
class Config:
    """Launch configurations for one problem size."""

    project: Tile
    transform: Tile
    expand: Tile  # `transform` without T_b
    outer: Tile
    unmix_rows: int
    unmix_cols: int
    device: Device
    pdl: bool
    groups: int  # of Hopper's own kernels; 0 for the plain ones


@functools.lru_cache(maxsize=4096)
def default_config(rows: int, tokens: int, width: int, rank: int, device: Device) -> Config:
    """The rule: as few waves of as tall tiles as the multiprocessors and their memory allow."""
    multiprocessors, shared, major = device[1:]
    block_rank = block(rank)
    big = shared >= 200_000 and block_rank <= 256

    def waves(m: int) -> int:
        # 24 rows' worth of work is what a tile costs beside its rows (fill, weights, drain).
        return -(-rows // (m * multiprocessors)) * (m + 24)

    choices = candidates(rows, tokens, rank, device)
    # Short samples: a tall tile would hold too many of them.
    tall = min(choices["tall"], key=waves)
    # Hopper's own kernels: one to three groups of 64 rows, as many as make the least work when a
    # tile costs one group's worth beside its rows (weights, fill, drain).
    groups = 0
    if rows > 4096 and len(choices["groups"]) > 1:
        groups = min((1, 2, 3), key=lambda g: -(-rows // (64 * g * multiprocessors)) * (g + 1))
    if device.index is not None:
        tuned = tuning.chosen("cluster_attention", device.index, (rows, tokens, width, rank))
        if tuned.get("tall") in choices["tall"] and tuned.get("groups") in choices["groups"]:
            tall, groups = tuned["tall"], tuned["groups"]
    if tall == 64:
        project = Tile(64, 0, block_rank if big else min(block_rank, 128), 64, 4, 4 if big else 3)
        transform = Tile(64, 0, 128 if big else 64 if shared >= 150_000 else 32, 64, 8, 2)
    else:
        project = Tile(128, tall - 128, block_rank, 64, 8, 3)
        transform = Tile(128, tall - 128, 128, 64, 8, 2)
    tiles = -(-rows // project.all_rows)
    if tiles * 2 <= multiprocessors:
        project = Tile(64, 0, min(block_rank, 64), 64, 4, 4)
        transform = Tile(64, 0, 64, 64, 4, 3 if big else 2)
    if big and tokens >= 16 and tiles * 2 > multiprocessors:
        expand = Tile(128, 0, 64, 64, 8, 3)
    else:  # many samples to a tile, or a large rank: their tables take shared memory, too
        expand = Tile(64, 0, 32, 64, transform.warps, 2)
    half = min(block_rank, 128)
    outer = Tile(half, 0, block_rank if big else half, 64, 8 if big else 4, 3 if big else 2)
    return Config(
        project=project,
        transform=transform,
        expand=expand,
        outer=outer,
        unmix_rows=64,
        unmix_cols=256 if big else 128,
        device=device,
        pdl=major >= 9,
        groups=groups,
    )


def candidates(rows: int, tokens: int, rank: int, device: Device) -> dict[str, tuple[int, ...]]:
    """What may be tuned: the plain kernels' row tile; Hopper's groups (0: the plain ones)."""
    big = device.shared >= 200_000 and block(rank) <= 256
    hopper = device.major == 9 and rank in (64, 128, 256) and tokens >= 5 and _gluon() is not None
    return {
        "tall": (192, 128, 64) if big and tokens >= 16 else (64,),
        "groups": (0, 1, 2, 3) if hopper else (0,),
    }


def _slots(tile_rows: int, rows: int, tokens: int) -> int:
    """How many samples the rows of one tile can belong to."""
    return min((tile_rows - 2) // tokens + 2, tile_rows, rows // tokens)


def config_for(x: Tensor, rank: int) -> Config:
    batch, tokens, width = x.shape
    return default_config(batch * tokens, tokens, width, rank, device_of(x.device.index))


def _rows_desc(t: Tensor, tile: Tile, cols: int) -> tuple:
    """Descriptors of a [rows, cols] matrix for the two parts of a row tile."""
    first = Descriptor(t, [tile.rows, cols])
    if not tile.extra_rows:
        return first, None
    return first, Descriptor(t, [tile.extra_rows, cols])


def _samples_desc(t: Tensor, tile: Tile, cols: int) -> tuple:
    first = Descriptor(t, [1, tile.rows, cols])
    if not tile.extra_rows:
        return first, None
    return first, Descriptor(t, [1, tile.extra_rows, cols])


def project(x, weight, bias, tokens, config, *, transposed, sums):
    """x [rows, C] times weight ([R, C], or [C, R] if transposed) plus bias, and x's token sums.

    Returns:
        [rows, R], the sums as [tiles, slots, C] fp32 (``None`` unless ``sums``), and how many
        rows a tile of the sums has.
    """
    rows, width = x.shape
    rank = weight.shape[1 if transposed else 0]
    if config.groups:
        out, _, partial, _ = _project_specialised(x, weight, bias, tokens, config, transposed, sums)
        return out, partial, 64
    tile = config.project
    out = x.new_empty(rows, rank)
    tiles = -(-rows // tile.all_rows)
    slots = _slots(tile.all_rows, rows, tokens)
    partial = x.new_empty(tiles, slots, width, dtype=torch.float32) if sums else None
    box = [tile.depth, tile.cols] if transposed else [tile.cols, tile.depth]
    launch(
        kernels.project_kernel,
        (tiles, -(-rank // tile.cols)),
        config.device,
        *_rows_desc(x, tile, tile.depth),
        Descriptor(weight, box),
        *_rows_desc(out, tile, tile.cols),
        bias,
        partial,
        rows,
        width,
        rank,
        tokens,
        slots,
        BM0=tile.rows,
        BM1=tile.extra_rows,
        BN=tile.cols,
        BK=tile.depth,
        BS=block(slots),
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        SUMS=sums,
        pdl=config.pdl,
        warps=tile.warps,
        stages=tile.stages,
    )
    return out, partial, tile.all_rows


def project_back(g, weight, mixed, config, *, sums, mix, mixed_sums):
    """gz = g @ weight [C, R], and gh = gz @ T_bᵀ if ``mix``.

    Returns:
        gz and gh [rows, R]; the column sums of g [tiles, C] and of gh [tiles, R], fp32; ``None``
        for what is not asked for.
    """
    rows = g.shape[0]
    if config.groups:
        return _project_specialised(
            g, weight, None, rows, config, True, sums, mixed if mix else None, mixed_sums
        )
    gz, g_sums, _ = project(g, weight, None, rows, config, transposed=True, sums=sums)
    gh = gh_sums = None
    if mix:
        gh = torch.empty_like(gz)
        _, gh_sums = transform(
            gz, mixed.shape[0], config, mixed=mixed, t_transposed=True, z=gh, sums=mixed_sums
        )
    return gz, gh, g_sums, gh_sums


def _project_specialised(
    x, weight, bias, tokens, config, transposed, sums, mixed=None, mixed_sums=False
):
    rows, width = x.shape
    rank = weight.shape[1 if transposed else 0]
    groups = config.groups
    tiles = -(-rows // (64 * groups))
    slots = _slots(64, rows, tokens)
    out = x.new_empty(rows, rank)
    out_mixed = None if mixed is None else torch.empty_like(out)
    x_sums = x.new_empty(tiles * groups, slots, width, dtype=torch.float32) if sums else None
    out_sums = x.new_empty(tiles * groups, rank, dtype=torch.float32) if mixed_sums else None
    launch(
        _gluon().project_kernel,
        (tiles,),
        config.device,
        gluon_descriptor(x, [64, 64]),
        gluon_descriptor(weight, [64, rank] if transposed else [rank, 64]),
        None if mixed is None else gluon_descriptor(mixed.view(-1, rank), [64, rank]),
        gluon_descriptor(out, [64, 64]),
        None if mixed is None else gluon_descriptor(out_mixed, [64, 64]),
        bias,
        x_sums,
        out_sums,
        rows,
        width,
        tokens,
        slots,
        1 if mixed is None else rows // mixed.shape[0],
        v=_gluon().Project(
            rank=rank,
            groups=groups,
            stages=min(6, (_SHARED - 12_000) // ((64 * groups + rank) * 128)),
            slots=8 if slots <= 8 else 16,
            transposed=transposed,
            bias=bias is not None,
            sums=sums,
            mix=mixed is not None,
            mixed_sums=mixed_sums,
        ),
        pdl=config.pdl,
        warps=4,
    )
    if sums:  # the last tile may end in blocks of no rows, which have no sums
        x_sums = x_sums[: -(-rows // 64)]
    return out, out_mixed, x_sums, out_sums


def _transform_specialised(h, z, config, mixed, weight, w_transposed, bias, row_bias, tokens):
    rows, rank = h.shape
    width = weight.shape[1 if w_transposed else 0]
    y = h.new_empty(rows, width)
    groups = config.groups
    biases = 0 if bias is None else groups if row_bias else 1
    slot = rank * 128 + biases * 2048  # bytes of the ring's slots
    launch(
        _gluon().transform_kernel,
        (-(-rows // (64 * groups)),),
        config.device,
        gluon_descriptor(h, [64, 64]),
        None if mixed is None else gluon_descriptor(mixed.view(-1, rank), [rank, 64]),
        gluon_descriptor(weight, [rank, 64] if w_transposed else [64, rank]),
        None if z is None else gluon_descriptor(z, [64, 64]),
        gluon_descriptor(y, [64, 64]),
        None if bias is None else gluon_descriptor(bias.to(h.dtype).view(-1, width), [16, 64]),
        rows,
        tokens,
        width,
        v=_gluon().Transform(
            rank=rank,
            groups=groups,
            stages=min(6, (_SHARED - groups * rank * 128) // slot),
            mix=mixed is not None,
            store_z=z is not None,
            w_transposed=w_transposed,
            biases=biases,
            row_bias=row_bias,
        ),
        pdl=config.pdl,
        warps=4,
    )
    return y


_SHARED = 231_000  # bytes of Hopper's shared memory for tiles, barriers set aside


@functools.lru_cache
def _gluon():
    """The kernels for Hopper; ``None`` where this Triton has another Gluon than they need."""
    try:
        from fastadapt.kernels import cluster_attention_gluon
    except (ImportError, AttributeError):
        return None
    return cluster_attention_gluon


def attend(sums, centers, tokens, tile_rows, batch, config):
    """Token sums and centers to the packed state, fp32: a, s, q, |q|, |centers|."""
    width, num_centers = centers.shape
    state = sums.new_empty(batch * (2 * num_centers + width + 1) + num_centers)
    block_k = block(num_centers)
    # More samples than multiprocessors: leave room for several programs on each.
    crowded = batch > config.device.multiprocessors
    block_c = min(block(width), (16384 if crowded else 32768) // block_k)
    launch(
        kernels.attend_kernel,
        (batch,),
        config.device,
        sums,
        centers,
        state,
        batch,
        tokens,
        width,
        tile_rows,
        sums.shape[1],
        num_centers=num_centers,
        BC=block_c,
        BK=block_k,
        BT=min(8, block((tokens - 2) // tile_rows + 2, 1)),
        ONE_BLOCK=block_c >= width,
        pdl=config.pdl,
        warps=4 if crowded else 8,
    )
    return state


def mix(state, transforms, batch, dtype, config):
    """T_b [B, R, R] in ``dtype`` from a [B, K], where the state begins, and the transforms."""
    num_centers = transforms.shape[0]
    size = transforms[0].numel()
    mixed = transforms.new_empty(batch, *transforms.shape[1:], dtype=dtype)
    # With few samples and many centers, Triton 3.6 gave NaN from a tile of 16 (fp16, 128 centers).
    bb = min(64, block(batch)) if num_centers <= 32 else 64
    bs = 256 if dtype != torch.float32 else 64
    flat = mixed.view(batch, size)
    aligned = size * mixed.element_size() % 16 == 0
    launch(
        kernels.mix_kernel,
        (-(-size // bs), -(-batch // bb)),
        config.device,
        state,
        transforms,
        mixed,
        Descriptor(flat, [bb, bs]) if aligned else None,
        batch,
        num_centers,
        size,
        BB=bb,
        BK=block(num_centers),
        BS=bs,
        pdl=config.pdl,
        warps=4,
    )
    return mixed


def transform(
    h,
    batch,
    config,
    *,
    mixed=None,
    t_transposed=False,
    z=None,
    weight=None,
    w_transposed=False,
    bias=None,
    row_bias=False,
    sums=False,
):
    """z = h @ T_b (or T_bᵀ), then y = z @ weightᵀ (or weight) + bias, each part if asked for.

    Args:
        h: [rows, R].
        mixed: [B, R, R], or ``None`` for z = h.
        z: [rows, R] to write z to; may be ``h``.
        weight: [C, R], or [R, C] if ``w_transposed``; ``None`` for no y.
        bias: [C], or [B, C] with ``row_bias``.
        sums: also the column sums of z over each row tile.

    Returns:
        y [rows, C] or ``None``; sums [tiles, R] fp32 or ``None``.
    """
    rows, rank = h.shape
    tokens = rows // batch
    if config.groups and weight is not None:
        y = _transform_specialised(
            h, z, config, mixed, weight, w_transposed, bias, row_bias, tokens
        )
        return y, None
    tile = config.expand if mixed is None else config.transform
    block_rank = block(rank)
    tiles = -(-rows // tile.all_rows)
    width = cols = 0
    y, parts = None, 1
    if weight is not None:
        width = weight.shape[1 if w_transposed else 0]
        y = h.new_empty(rows, width)
        # Few row tiles: several programs share the columns of one.
        parts = max(1, min(-(-width // tile.cols), config.device.multiprocessors // tiles))
        cols = tile.cols * -(-width // (tile.cols * parts))
        parts = -(-width // cols)
    partial = h.new_empty(tiles, rank, dtype=torch.float32) if sums else None
    depth = min(tile.depth, block_rank)
    none = (None, None)
    launch(
        kernels.transform_kernel,
        (tiles, parts),
        config.device,
        *(
            _rows_desc(h, tile, block_rank)
            if mixed is None
            else _samples_desc(h.view(batch, tokens, rank), tile, depth)
        ),
        None
        if mixed is None
        else Descriptor(
            mixed,
            [1, block_rank, depth] if t_transposed else [1, depth, block_rank],
        ),
        None
        if weight is None
        else Descriptor(
            weight,
            [block_rank, tile.cols] if w_transposed else [tile.cols, block_rank],
        ),
        *(none if z is None else _rows_desc(z, tile, block_rank)),
        *(none if y is None else _rows_desc(y, tile, tile.cols)),
        bias,
        partial,
        rows,
        tokens,
        rank,
        width,
        cols,
        BM0=tile.rows,
        BM1=tile.extra_rows,
        BR=block_rank,
        BK=depth,
        BC=tile.cols,
        BS=block(_slots(tile.all_rows, rows, tokens)),
        MIX=mixed is not None,
        T_TRANSPOSED=t_transposed,
        STORE_Z=z is not None,
        UP=y is not None,
        W_TRANSPOSED=w_transposed,
        BIAS=bias is not None and not row_bias,
        ROW_BIAS=row_bias,
        SUMS=sums,
        pdl=config.pdl,
        warps=tile.warps,
        stages=tile.stages,
    )
    return y, partial


def outer(h, g, batch, config):
    """hᵀ @ g for each sample: [B, R, R] in their dtype."""
    rows, rank = h.shape
    tokens = rows // batch
    tile = config.outer
    depth = min(tile.depth, block(tokens))
    out = h.new_empty(batch, rank, rank)
    tiles_j = -(-rank // tile.cols)
    h = h.view(batch, tokens, rank)
    g = g.view(batch, tokens, rank)
    launch(
        kernels.outer_kernel,
        (-(-rank // tile.rows) * tiles_j, batch),
        config.device,
        Descriptor(h, [1, depth, tile.rows]),
        Descriptor(g, [1, depth, tile.cols]),
        Descriptor(out, [1, tile.rows, tile.cols]),
        tokens,
        tiles_j,
        BI=tile.rows,
        BJ=tile.cols,
        BK=depth,
        pdl=config.pdl,
        warps=tile.warps,
        stages=tile.stages,
    )
    return out


def unmix(d_mixed, state, transforms, config, *, need_transforms, need_a):
    """Gradients of ``mix``: dtransforms (transforms' dtype) and da as [programs, B, K] sums."""
    batch, num_centers = d_mixed.shape[0], transforms.shape[0]
    size = transforms[0].numel()
    bs = config.unmix_cols if d_mixed.dtype != torch.float32 else 64
    blocks = -(-size // bs)
    # The partial sums of da stay under 64 MB; more samples or centers get fewer programs.
    programs = min(blocks, max(16, (1 << 24) // (batch * num_centers)))
    d_transforms = torch.empty_like(transforms) if need_transforms else None
    da = state.new_empty(programs, batch, num_centers) if need_a else None
    flat = d_mixed.view(batch, size)
    rows = config.unmix_rows if d_mixed.dtype != torch.float32 else 32
    bb = min(rows, block(batch)) if num_centers <= 32 else rows
    aligned = size * flat.element_size() % 16 == 0
    launch(
        kernels.unmix_kernel,
        (programs,),
        config.device,
        flat,
        Descriptor(flat, [bb, bs]) if aligned else None,
        state,
        transforms,
        d_transforms,
        da,
        batch,
        num_centers,
        size,
        BB=bb,
        BK=block(num_centers),
        BS=bs,
        NEED_T=need_transforms,
        NEED_A=need_a,
        pdl=config.pdl,
        warps=4,
        stages=3,
    )
    return d_transforms, da


def unattend(da, state, centers, tokens, dtype, config, *, need_x):
    """Gradients of ``attend``: ds [B, K] fp32, and dq / N [B, C] (``None`` unless ``need_x``)."""
    batch = da.shape[1]
    width, num_centers = centers.shape
    ds = da.new_empty(batch, num_centers)
    dq = da.new_empty(batch, width, dtype=dtype) if need_x else None
    block_k = block(num_centers)
    launch(
        kernels.unattend_kernel,
        (batch,),
        config.device,
        da,
        state,
        centers,
        ds,
        dq,
        da.shape[0],
        batch,
        tokens,
        width,
        num_centers=num_centers,
        BP=min(block(da.shape[0]), 8192 // block_k),
        BC=max(16, min(block(width), 16384 // block_k)),
        BK=block_k,
        NEED_X=need_x,
        pdl=config.pdl,
        warps=8,
    )
    return ds, dq


def reduce(ds, state, batch, centers, up_sums, down_sums, config, d_centers, d_up, d_down):
    """The sums over samples and tiles, written to whichever of the last three is not ``None``."""
    width, num_centers = centers.shape
    rank = 0 if d_down is None else d_down.shape[0]
    bc = 32
    programs = [0 if d is None else -(-d.shape[0] // bc) for d in (d_centers, d_up, d_down)]
    launch(
        kernels.reduce_kernel,
        (sum(programs),),
        config.device,
        ds,
        state,
        centers,
        d_centers,
        up_sums,
        d_up,
        down_sums,
        d_down,
        batch,
        width,
        rank,
        0 if up_sums is None else up_sums.shape[0],
        0 if down_sums is None else down_sums.shape[0],
        *programs[:2],
        num_centers=num_centers,
        BB=32,
        BC=bc,
        BK=block(num_centers),
        NEED_CENTERS=d_centers is not None,
        NEED_UP=d_up is not None,
        NEED_DOWN=d_down is not None,
        pdl=config.pdl,
        warps=4,
    )


def forward(x, centers, transforms, down_weight, down_bias, up_weight, up_bias, *, save_z):
    """Cluster attention; x [B, N, C] and the projections have one dtype, the rest any.

    Returns:
        y [B, N, C], and what the backward needs: h [B·N, R] (empty in token mode), T_b
        [B, R, R], the state of ``attend`` and, if ``save_z``, h @ T_b [B·N, R] (else empty).
    """
    batch, tokens, width = x.shape
    centers = centers.contiguous()
    transforms = transforms.contiguous()
    if down_weight is None or x.dtype == torch.float32:
        args = (x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
        return _forward_unfused(*args, save_z)
    rank = down_weight.shape[0]
    config = config_for(x, rank)
    x = _pad(x, 1)
    # Before the first kernel: `mix` reads the transforms before it waits for its predecessor.
    transforms = _pad(transforms, 2)
    h, sums, tile_rows = project(
        x.view(-1, x.shape[2]),
        _pad(down_weight, 2),
        None if down_bias is None else _pad(down_bias, 1),
        tokens,
        config,
        transposed=False,
        sums=True,
    )
    sums = _unpad(sums, width)
    state = attend(sums, centers, tokens, tile_rows, batch, config)
    mixed = mix(state, transforms, batch, x.dtype, config)
    z = torch.empty_like(h) if save_z else None
    y, _ = transform(
        h,
        batch,
        config,
        mixed=mixed,
        z=z,
        weight=_pad(up_weight, 2),
        bias=None if up_bias is None else _pad(up_bias, 1),
    )
    saved = (h, mixed, state, x.new_empty(0) if z is None else z)
    return _unpad(y, width).view(batch, tokens, width), saved


def backward(g, needs, args, saved):
    """Gradients of ``forward`` in the order of its arguments, ``None`` where ``needs`` has none.

    Args:
        g: [B, N, C], the gradient of y.
        needs: seven booleans.
        args: of ``forward``.
        saved: what it returned beside y, as a list; it is emptied.
    """
    x, centers, transforms, down_weight, down_bias, up_weight, up_bias = args
    centers = centers.contiguous()
    transforms = transforms.contiguous()
    if down_weight is None or x.dtype == torch.float32:
        args = (x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
        return _backward_unfused(g, needs, args, saved)
    need_x, need_centers, need_transforms, need_down, need_down_bias, need_up, need_up_bias = needs
    need_a = need_x or need_centers
    batch, tokens, width = x.shape
    rank = down_weight.shape[0]
    config = config_for(x, rank)
    dx = d_transforms = d_down = d_up = da = ds = dq = None

    # In an order that lets every intermediate go before the next large one comes.
    h, mixed, state, z = saved
    saved.clear()
    if need_up:
        if not z.numel():
            z = torch.empty_like(h)
            transform(h, batch, config, mixed=mixed, z=z)
        d_up = torch.mm(g.reshape(-1, width).t(), z)
    del z
    gz, gh, up_sums, down_sums = project_back(
        _pad(g, 1).flatten(0, 1),
        _pad(up_weight, 2),
        mixed,
        config,
        sums=need_up_bias,
        mix=need_x or need_down or need_down_bias,
        mixed_sums=need_down_bias,
    )
    del mixed
    # What was written last is still in the L2 cache: G_b, its gradients, then gh twice.
    if need_a or need_transforms:
        d_mixed = outer(h, gz, batch, config)
        del h, gz
        d_transforms, da = unmix(
            d_mixed,
            state,
            _pad(transforms, 2),
            config,
            need_transforms=need_transforms,
            need_a=need_a,
        )
        del d_mixed
    if need_a:
        ds, dq = unattend(da, state, centers, tokens, x.dtype, config, need_x=need_x)
    if need_down:
        d_down = torch.mm(gh.t(), x.reshape(-1, width))
    d_centers = torch.empty_like(centers) if need_centers else None
    d_down_bias = torch.empty_like(down_bias) if need_down_bias else None
    d_up_bias = torch.empty_like(up_bias) if need_up_bias else None
    if need_centers or need_down_bias or need_up_bias:
        up_sums = None if up_sums is None else _unpad(up_sums.flatten(0, 1), width)
        down_sums = None if down_sums is None else _unpad(down_sums, rank)
        reduce(
            ds,
            state,
            batch,
            centers,
            up_sums,
            down_sums,
            config,
            d_centers,
            d_up_bias,
            d_down_bias,
        )
    if need_x:
        dx, _ = transform(
            gh,
            batch,
            config,
            weight=_pad(down_weight, 2),
            w_transposed=True,
            bias=_pad(dq, 1),
            row_bias=True,
        )
        dx = _unpad(dx, width).view(batch, tokens, width)
    if d_transforms is not None:
        d_transforms = _unpad(d_transforms, rank, 2)
    if d_down is not None:
        d_down = d_down[:rank].contiguous()
    if d_up is not None:
        d_up = d_up[:, :rank].contiguous()
    return dx, d_centers, d_transforms, d_down, d_down_bias, d_up, d_up_bias


def _forward_unfused(x, centers, transforms, down_weight, down_bias, up_weight, up_bias, save_z):
    """Token mode and fp32: the products are cuBLAS's, attention and mixing ours."""
    batch, tokens, _ = x.shape
    config = config_for(x, 16)
    sums = x.sum(1, dtype=torch.float32).unsqueeze(1)
    state = attend(sums, centers, tokens, tokens, batch, config)
    mixed = mix(state, transforms, batch, x.dtype, config)
    if down_weight is None:
        return torch.bmm(mixed, x), (x.new_empty(0), mixed, state, x.new_empty(0))
    h = F.linear(x, down_weight, down_bias)
    z = torch.bmm(h, mixed)
    y = F.linear(z, up_weight, up_bias)
    return y, (h.flatten(0, 1), mixed, state, z.flatten(0, 1) if save_z else x.new_empty(0))


def _backward_unfused(g, needs, args, saved):
    x, centers, transforms, down_weight, down_bias, up_weight, up_bias = args
    h, mixed, state, z = saved
    saved.clear()
    need_x, need_centers, need_transforms, need_down, need_down_bias, need_up, need_up_bias = needs
    need_a = need_x or need_centers
    batch, tokens, _ = x.shape
    config = config_for(x, 16)
    d_centers = torch.empty_like(centers) if need_centers else None
    dx = d_transforms = d_down = d_down_bias = d_up = d_up_bias = dq = None
    if down_weight is not None:
        h = h.view(batch, tokens, -1)
        gz = g @ up_weight
        if need_up:
            z = z if z.numel() else torch.bmm(h, mixed).flatten(0, 1)
            d_up = g.flatten(0, 1).t() @ z
            del z
        if need_up_bias:
            d_up_bias = g.sum((0, 1)).to(up_bias.dtype)
        gh = torch.bmm(gz, mixed.transpose(1, 2))
        if need_down:
            d_down = gh.flatten(0, 1).t() @ x.flatten(0, 1)
        if need_down_bias:
            d_down_bias = gh.sum((0, 1)).to(down_bias.dtype)
    if need_a or need_transforms:
        d_mixed = torch.bmm(g, x.mT) if down_weight is None else torch.bmm(h.mT, gz)
        d_transforms, da = unmix(
            d_mixed,
            state,
            transforms,
            config,
            need_transforms=need_transforms,
            need_a=need_a,
        )
        del d_mixed
    if need_a:
        ds, dq = unattend(da, state, centers, tokens, x.dtype, config, need_x=need_x)
        if need_centers:
            reduce(ds, state, batch, centers, None, None, config, d_centers, None, None)
    if need_x:
        dx = torch.bmm(mixed.mT, g) if down_weight is None else gh @ down_weight
        dx += dq.to(dx.dtype).unsqueeze(1)
    return dx, d_centers, d_transforms, d_down, d_down_bias, d_up, d_up_bias


# The bulk copies need rows of whole 16 bytes: other widths are padded with zeros, which change
# nothing, and cut off again.


def _pad(t: Tensor, dims: int) -> Tensor:
    """t contiguous, aligned, its last ``dims`` dimensions padded to multiples of 8."""
    pad = [-n % 8 for n in t.shape[: -dims - 1 : -1]]
    if any(pad):
        return F.pad(t, [p for n in pad for p in (0, n)])
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _unpad(t: Tensor, width: int, dims: int = 1) -> Tensor:
    if t.shape[-1] == width:
        return t
    return (t[..., :width] if dims == 1 else t[..., :width, :width]).contiguous()
