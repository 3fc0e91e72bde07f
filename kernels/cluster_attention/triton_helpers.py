"""Parts of the Triton kernels of cluster attention that the forward and the backward share."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-12)  # F.normalize's


@triton.jit
def sample_of_row(row, first, tokens, BM: tl.constexpr, BS: tl.constexpr):
    """Return one-hot rows [BM, BS]: which of the samples from ``first`` on a row belongs to."""
    o_m = row + tl.arange(0, BM)
    return (o_m // tokens - first)[:, None] == tl.arange(0, BS)[None, :]


@triton.jit
def state_pointers(ptr, batch, width, num_centers):
    """Return where s, q, |q| and |centers| lie in the packed state, after a [B, K]."""
    batch = tl.cast(batch, tl.int64)
    s_ptr = ptr + batch * num_centers
    q_ptr = s_ptr + batch * num_centers
    q_norm_ptr = q_ptr + batch * width
    return s_ptr, q_ptr, q_norm_ptr, q_norm_ptr + batch


@triton.jit
def load_centers(ptr, c, width, num_centers: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    """Load the centers' rows [c, c + BC) in fp32."""
    # num_centers is a constant here, so that the compiler knows how far rows are aligned.
    o_c = c + tl.arange(0, BC)
    o_k = tl.arange(0, BK)
    p = ptr + o_c[:, None] * num_centers + o_k[None, :]
    mask = (o_c < width)[:, None] & (o_k < num_centers)[None, :]
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)
