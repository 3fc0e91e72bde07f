"""A linear layer with all that follows it in the product's epilogue, for inference.

For x [M, K], W [N, K], both in half precision or both in e4m3 (then they stand for x and W times a
scale each, and α is the product of both scales), a bias b [N], and a factor f:

    (1)  y    = α · x · Wᵀ + b              [M, N]  accumulated in fp32
    (2)  z    = gelu(y), or y               in the tanh form
    (3)  out  = z in half precision; z · f in e4m3; or r + z, r [M, N] in half precision or fp32

All of it is one kernel of cuBLASLt, the fastest of those that it proposes. PyTorch's product in
e4m3, ``torch._scaled_mm``, has neither GELU nor a sum: GELU, rounding and the sum would each read
and write the result once more, which costs as much as products in e4m3 save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import BackendError, choose_backend, on_device
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
    in_place: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Compute a linear layer and what follows it; there is no gradient.

    Args:
        x: [M, K]; bf16, fp16 or e4m3.
        weight: [N, K] in x's dtype.
        bias: [N] in the result's dtype (the residual's, where there is one); bf16 if that is e4m3.
        alpha: what the product is multiplied by.
        gelu: apply GELU in its tanh form.
        factor: round the result times this to e4m3 (x in e4m3 alone); ``None``: the result is in
            half precision, bf16 for x in e4m3.
        residual: [M, N] in half precision, or fp32 where x is no e4m3, to which the result is
            added.
        in_place: write the sum into the residual; else into new memory.
        backend: ``"auto"`` (cuBLASLt where it can, from compute capability 9.0 on, and products in
            e4m3 from 8.9 on; else the reference), ``"cublas"`` (an error that names the reason
            where it can't) or ``"reference"``.

    Returns:
        [M, N]; ``residual`` itself if it is written into.

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
    epilogue = Epilogue(alpha, gelu, factor, residual, in_place)
    by_default = reason is None and (x.dtype == E4M3 or epilogues_are_fast(x))
    if backend != "cublas" and not (backend == "auto" and by_default):
        return linear_epilogue_reference(x, weight, bias, epilogue)
    from . import cublas

    with on_device(x):
        try:
            return cublas.linear(x, weight, bias, epilogue)
        except cublas.NoKernelError:
            if backend == "cublas":
                raise
    return linear_epilogue_reference(x, weight, bias, epilogue)


def epilogues_are_fast(x: Tensor) -> bool:
    """Tell whether ``"auto"`` takes cuBLASLt in half precision: where it was measured.

    Elsewhere a sum or GELU in a product of the reference is a kernel of its own.
    """
    if not x.is_cuda or torch.version.hip is not None or choose_backend("auto", None) != "triton":
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)
