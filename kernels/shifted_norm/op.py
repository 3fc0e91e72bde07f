"""LayerNorm of shifted rows: ``LayerNorm(x + t)``.

For x [M, C], a shift t [C], and the norm's weight and bias where it has any:

    (1)  n  = LayerNorm(x + t)   [M, C]

In a residual stream to which the library's products add in place, the sums lack these products'
biases: their sum is t, which is added here, where x is read anyway.
"""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import choose_backend, on_device
from ..common.e4m3 import why_not_e4m3
from ..layer_norm.checks import why_not_triton
from .reference import shifted_norm_reference


def shifted_norm(
    x: Tensor,
    shift: Tensor | None,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    factor: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalize the rows of x + shift, for inference: there is no gradient.

    Args:
        x: [..., C]; fp32, bf16 or fp16. Any strides.
        shift: [C] or ``None``.
        eps: added to the variance.
        weight, bias: [C] of the norm; both or none.
        factor: round the result times this to e4m3; ``None``: the result is in x's dtype.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [..., C] in x's dtype or e4m3.

    Raises:
        BackendError: ``backend="triton"`` and the kernel does not cover the call.
    """
    vectors = [t for t in (shift, weight, bias) if t is not None]
    reason = why_not_triton(x, *vectors) or (factor and why_not_e4m3(x))
    if choose_backend(backend, reason or None) == "reference":
        return shifted_norm_reference(x, shift, eps, weight, bias, factor)
    from . import launches  # Triton is imported with the first call

    with on_device(x):
        return launches.shifted_norm(x, shift, eps, weight, bias, factor)
