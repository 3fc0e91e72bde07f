"""Self-attention that reads q, k and v where their product left them.

For qkv [B, N, 3·H·D], the result of one product for q, k and v (timm's layout), H heads of D
channels and a scale c:

    (1)  q, k  = LayerNorm over D, where there are such norms        [B, H, N, D]
    (2)  s     = c · q · kᵀ                                          [B, H, N, N]  fp32
    (3)  p     = softmax of s over keys                              [B, H, N, N]  fp32
    (4)  out   = p · v, heads side by side                           [B, N, H·D]

(2) to (4) are one kernel: s and p never leave the chip, and neither a permutation nor a copy stands
before or after it. c is folded into the exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, on_device, without_autocast
from .checks import HeadNorms, check_shapes, why_not_triton
from .reference import qkv_attention_reference


def qkv_attention(
    qkv: Tensor,
    heads: int,
    *,
    scale: float | None = None,
    norms: HeadNorms | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute self-attention of a packed product, for inference: there is no gradient.

    Args:
        qkv: [B, N, 3·H·D]; fp32, bf16 or fp16.
        heads: H.
        scale: of the products of queries and keys; ``None``: D^(−1/2).
        norms: of queries and keys, over D.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [B, N, H·D] in qkv's dtype.

    Raises:
        ValueError: a shape does not fit; the message names it.
        BackendError: ``backend="triton"`` and the kernel does not cover the call.
    """
    check_shapes(qkv, heads, norms)
    scale = (qkv.shape[-1] // (3 * heads)) ** -0.5 if scale is None else scale
    # Where there is no TMA, PyTorch's kernel for short sequences needs fewer registers.
    by_default = not qkv.is_cuda or torch.cuda.get_device_capability(qkv.device)[0] >= 9
    why_not = why_not_triton(qkv, heads, scale)
    if choose_backend(backend, why_not, by_default=by_default) == "reference":
        return qkv_attention_reference(qkv, heads, scale=scale, norms=norms)
    from . import launches  # Triton is imported with the first call

    with on_device(qkv), without_autocast(qkv):
        return launches.attention(qkv.contiguous(), heads, scale, norms)
