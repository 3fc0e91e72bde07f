"""A linear layer with all that follows it in the product's epilogue, for inference.

For x [M, K], W [N, K], both in half precision or both in e4m3 (then they stand for x and W times a
scale each, and α is the product of both scales), a bias b [N], and a factor f:

    (1)  y    = α · x · Wᵀ + b              [M, N]  accumulated in fp32
    (2)  z    = gelu(y), or y               in the tanh form
    (3)  out  = z in half precision; z · f in e4m3; or r + z in place, r [M, N]

All of it is one kernel of cuBLASLt, the fastest of those that it proposes. PyTorch's product in
e4m3, ``torch._scaled_mm``, has neither GELU nor a sum: GELU, rounding and the sum would each read
and write the result once more, which costs as much as products in e4m3 save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import BackendError, on_device
from ..common.e4m3 import E4M3
from .checks import Epilogue, check_shapes, why_not_cublas
from .reference import linear_epilogue_reference

BACKENDS = ("auto", "cublas", "reference")


def linear_epilogue(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    gelu: bool = False,
    factor: float | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute a linear layer and what follows it; there is no gradient.

    Args:
        x: [M, K]; bf16, fp16 or e4m3.
        weight: [N, K] in x's dtype.
        bias: [N] in the result's dtype, bf16 if that is in e4m3.
        alpha: what the product is multiplied by.
        gelu: apply GELU in its tanh form.
        factor: round the result times this to e4m3 (x in e4m3 alone); ``None``: the result is in
            half precision, bf16 for x in e4m3.
        residual: [M, N], to which the result is added in place.
        backend: ``"auto"`` (cuBLASLt where it can, from compute capability 9.0 on, and products in
            e4m3 from 8.9 on; else the reference), ``"cublas"`` (an error that names the reason
            where it can't) or ``"reference"``.

    Returns:
        [M, N]; ``residual`` if there is one.

    Raises:
        ValueError: a shape, dtype or combination does not fit; the message names it.
        BackendError: ``backend="cublas"`` and it does not take the call.
    """
    check_shapes(x, weight, bias, residual)
    if factor is not None and (x.dtype != E4M3 or residual is not None):
        raise ValueError("`factor` goes with x in e4m3 and without a residual")
    if gelu and residual is not None:
        raise ValueError("a sum with a residual is without GELU")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    reason = None if backend == "reference" else why_not_cublas(x, weight, bias, residual)
    if backend == "cublas" and reason is not None:
        raise BackendError(f"backend 'cublas' cannot run this call: {reason}")
    epilogue = Epilogue(alpha, gelu, factor, residual)
    wanted = backend == "cublas" or (backend == "auto" and reason is None and _by_default(x))
    if not wanted:
        return linear_epilogue_reference(x, weight, bias, epilogue)
    from . import cublas

    with on_device(x):
        return cublas.linear(x, weight, bias, epilogue)


def _by_default(x: Tensor) -> bool:
    """Return whether ``"auto"`` takes cuBLASLt: where it was measured, or there is nothing else."""
    return x.dtype == E4M3 or torch.cuda.get_device_capability(x.device) >= (9, 0)
