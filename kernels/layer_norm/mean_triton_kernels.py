"""Triton kernels of LayerNorm with the mean over tokens; imported on first use only.

A sample's tokens are split among programs, each of which leaves the sum of its normalised ones; a
small kernel adds the sums, always in the same order, and applies weight and bias.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block, device_of
from .triton_kernels import normalised


@triton.jit
def layer_norm_sum_kernel(
    x_ptr,  # [samples, tokens, WIDTH]
    parts_ptr,  # [samples, parts, WIDTH] fp32: sums of normalised tokens
    stats_ptr,  # [2, samples * tokens] fp32, mean and 1 / deviation, or None
    tokens,
    share,  # tokens of a program
    sample_stride,
    STRIDE: tl.constexpr,  # between tokens; a constant, so that the compiler knows its factors
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    o_c = tl.arange(0, BC)
    m_c = o_c < WIDTH
    total = tl.zeros((BC,), tl.float32)
    p_stats = stats_ptr + sample * tokens if stats_ptr is not None else None
    for token in range(first, last, BT):
        o_t = token + tl.arange(0, BT)
        m_t = o_t < last
        mask = m_t[:, None] & m_c[None, :]
        offsets = sample * sample_stride + o_t.to(tl.int64) * STRIDE
        p_x = x_ptr + offsets[:, None] + o_c[None, :]
        x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        normal, mean, rstd = normalised(x, mask, WIDTH, EPS)
        total += tl.sum(normal, 0)
        if stats_ptr is not None:
            tl.store(p_stats + o_t, mean, mask=m_t)
            p_rstd = p_stats + tl.num_programs(0).to(tl.int64) * tokens
            tl.store(p_rstd + o_t, rstd, mask=m_t)
    part = sample * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + part * WIDTH + o_c, total, mask=m_c)


@triton.jit
def mean_kernel(
    parts_ptr,  # [samples, parts, width] fp32
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    out_ptr,  # [samples, width]
    parts,
    tokens,
    width,
    BP: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sample = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < width
    total = tl.zeros((BP, BC), tl.float32)
    for part in range(0, parts, BP):
        o_p = part + tl.arange(0, BP)
        p = parts_ptr + (sample * parts + o_p)[:, None] * width + o_c[None, :]
        total += tl.load(p, mask=(o_p < parts)[:, None] & m_c[None, :], other=0.0)
    weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    y = tl.sum(total, 0) / tokens * weight + bias
    tl.store(out_ptr + sample * width + o_c, y.to(out_ptr.dtype.element_ty), mask=m_c)


def share_of(samples: int, tokens: int, device: Device) -> int:
    """Tokens of a program: eight programs for each multiprocessor, four tokens or more."""
    parts = -(-8 * device.multiprocessors // samples)
    return max(4, ceil_div(tokens, parts))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, *, save: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The mean norm [B, C] of tokens x [B, N, C] in ``dtype``; with ``save`` each token's mean and
    1 / deviation, [2, B · N] fp32."""
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    samples, tokens, width = x.shape
    device = device_of(x.device.index)
    sums, mean, count = _forward_launches(samples, tokens, width, x.stride()[:2], eps, device)
    out = torch.empty((samples, width), dtype=dtype, device=x.device)
    parts = torch.empty((samples, count, width), dtype=torch.float32, device=x.device)
    stats = None
    if save:
        stats = torch.empty((2, samples * tokens), dtype=torch.float32, device=x.device)
    sums(x, parts, stats)
    mean(parts, weight, bias, out)
    return out, stats


@functools.lru_cache(maxsize=4096)
def _forward_launches(
    samples: int, tokens: int, width: int, strides: tuple[int, int], eps: float, device: Device
) -> tuple[Launch, Launch, int]:
    """Both kernels, and how many programs share a sample."""
    share = share_of(samples, tokens, device)
    parts = ceil_div(tokens, share)
    columns = block(width)
    sums = Launch(
        layer_norm_sum_kernel,
        (samples, parts),
        device,
        (tokens, share, strides[0]),
        (strides[1], width, eps, 4, columns),
        warps=min(16, columns // 256 or 1),
    )
    mean = Launch(
        mean_kernel,
        (samples, ceil_div(width, 128)),
        device,
        (parts, tokens, width),
        (min(64, block(parts, 1)), 128),
        warps=4,
    )
    return sums, mean, parts
