"""Triton kernel of the narrow MLP: equations (1) and (2) of :mod:`.op`.

Imported on first use only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..residual_mlp.triton_kernels import normal_integral

# gelu(h) = h · Φ(h), and in the tanh form Φ(h) = 1 / (1 + 2^(−SLOPE · (h + CUBE · h³))).
SLOPE = tl.constexpr(2.302208198)  # 2 · sqrt(2 / π) · log2(e)
CUBE = tl.constexpr(0.044715)


@triton.jit
def narrow_mlp_kernel(
    x_desc,  # [rows, C], blocks of [BM, BC]
    fc1_desc,  # [H, C], blocks of [BH, BC]
    fc1_bias_ptr,  # [H]
    fc2_desc,  # [C, H], blocks of [BC, BH]
    fc2_bias_ptr,  # [C]
    residual_desc,  # [rows, C], blocks of [BM, BC]
    out_desc,  # the same
    width,
    hidden,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    TANH: tl.constexpr,  # GELU's form
    PDL: tl.constexpr,
):
    """Compute BM rows, BH hidden columns at a time. Channels beyond the last are zero."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * BM
    x = x_desc.load([row, 0])
    acc = tl.zeros((BM, BC), tl.float32)
    for j in range(0, hidden, BH):
        fc1 = fc1_desc.load([j, 0])
        o_h = j + tl.arange(0, BH)
        bias = tl.load(fc1_bias_ptr + o_h, mask=o_h < hidden, other=0.0).to(tl.float32)
        h = tl.dot(x, fc1.T, input_precision="ieee") + bias[None, :]
        if TANH:
            below = 1.0 / (1.0 + tl.exp2(h * (h * h * CUBE + 1.0) * -SLOPE))
        else:
            below, _ = normal_integral(h, fc1_desc.dtype == tl.float32)
        fc2 = fc2_desc.load([0, j])
        acc = tl.dot((h * below).to(fc2.dtype), fc2.T, acc, input_precision="ieee")
    o_c = tl.arange(0, BC)
    acc += tl.load(fc2_bias_ptr + o_c, mask=o_c < width, other=0.0).to(tl.float32)[None, :]
    acc += residual_desc.load([row, 0]).to(tl.float32)
    out_desc.store([row, 0], acc.to(out_desc.dtype))
