"""A convolution whose patches do not overlap, as one product, from bytes or half precision.

For x [B, H, W, D], patches of P × P, a weight [C, P·P·D] in the order rows, columns, channels and a
table t [N, C], N = H·W / P² + F:

    (1)  a[n, f]  = the values of patch f of image n, minus 128 if they are bytes     [P·P·D]
    (2)  y[n, f]  = weight · a[n, f − F] + t[f]   for f ≥ F,   t[f]   for f < F       [C]  fp32
    (3)  out      = LayerNorm(y), or y                                                [B, N, C]

Bytes minus 128 are exact in bf16, so that an image's normalisation (x / 255 − mean) / std belongs
in weight and table: no normalised image is ever written. The table holds bias and position
embedding; its first F rows are what other tokens (the class token) begin with.
"""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import choose_backend, on_device, without_autocast
from .checks import Norm, check_shapes, why_not_triton
from .reference import patch_embedding_reference


def patch_embedding(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    patch: int,
    *,
    norm: Norm | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply patches with a weight and add a table; for inference, there is no gradient.

    Args:
        x: [B, H, W, D]; uint8 or the weight's dtype.
        weight: [C, P·P·D]; fp32, bf16 or fp16.
        table: [C], or [N, C] for every token, of any of these dtypes.
        patch: P.
        norm: over the channels of the result.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [B, N, C] in the weight's dtype.

    Raises:
        ValueError: a shape does not fit; the message names it.
        BackendError: ``backend="triton"`` and the kernel does not cover the call.
    """
    tokens = check_shapes(x, weight, table, patch, norm)
    if choose_backend(backend, why_not_triton(x, weight, norm)) == "reference":
        return patch_embedding_reference(x, weight, table, patch, norm)
    from . import launches  # Triton is imported with the first call

    with on_device(x), without_autocast(x):
        x, weight, table = x.contiguous(), weight.contiguous(), table.contiguous()
        return launches.embed(x, weight, table, patch, tokens, norm)
