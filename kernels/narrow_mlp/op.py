"""Two linear layers with GELU between them and a residual sum after them, in one kernel.

For x [M, C], W₁ [H, C], b₁ [H], W₂ [C, H], b₂ [C] and a residual r [M, C]:

    (1)  a  = gelu(x · W₁ᵀ + b₁)       [M, H], some columns at a time, on chip
    (2)  y  = r + a · W₂ᵀ + b₂         [M, C]

Of few channels, products are limited by memory when a is written and read: of 802,816 rows
(ConvNeXt at 56 × 56 pixels, batch 256) with 128 channels and 512 hidden ones a has 822 MB in bf16,
x and y 205. A program keeps its rows' sums of (2) in registers while both weights pass by, from the
second level cache.
"""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import choose_backend, on_device, without_autocast
from .checks import check_shapes, why_not_triton
from .reference import Gelu, narrow_mlp_reference


def narrow_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor,
    *,
    approximate: Gelu = "none",
    backend: str = "auto",
) -> Tensor:
    """Compute ``residual + fc2(gelu(fc1(x)))`` for inference: there is no gradient.

    Args:
        x: [M, C], C up to 128; fp32, bf16 or fp16.
        fc1_weight: [H, C] in x's dtype.
        fc1_bias: [H], of any of these dtypes.
        fc2_weight: [C, H] in x's dtype.
        fc2_bias: [C], of any of these dtypes.
        residual: [M, C]; any of these dtypes.
        approximate: of GELU, as PyTorch's: ``"none"``, or ``"tanh"`` for the form with tanh.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [M, C] in the residual's dtype.

    Raises:
        ValueError: a shape does not fit; the message names it.
        BackendError: ``backend="triton"`` and the kernel does not cover the call.
    """
    args = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
    check_shapes(*args)
    if choose_backend(backend, why_not_triton(x, fc1_weight, fc2_weight, residual)) == "reference":
        return narrow_mlp_reference(*args, approximate)
    from . import launches  # Triton is imported with the first call

    with on_device(x), without_autocast(x):
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual = (t.contiguous() for t in args)
        return launches.mlp(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, approximate=approximate
        )
