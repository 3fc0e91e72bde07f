"""A linear layer and what follows it in plain PyTorch: the ground truth of cuBLASLt's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..common.e4m3 import E4M3, to_e4m3
from .checks import Epilogue, half_of


def linear_epilogue_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue
) -> Tensor:
    """Compute the layer; arguments as :func:`~.op.linear_epilogue`."""
    alpha, gelu, factor, residual, in_place = epilogue
    if residual is not None and not in_place:
        residual = residual.clone()
    if x.dtype != E4M3 and residual is not None:
        if residual.dtype == x.dtype:
            residual.addmm_(x, weight.t(), alpha=alpha)
        else:
            residual.add_(F.linear(x, weight), alpha=alpha)
        return residual if bias is None else residual.add_(bias)
    if x.dtype != E4M3 and alpha == 1:
        y = F.linear(x, weight, bias)
    else:
        y = alpha * (x.float() @ weight.float().t())
        y = y if bias is None else y + bias.float()
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if residual is not None:
        return residual.add_(y)
    if factor is not None:
        return to_e4m3(y, factor)
    return y.to(half_of(x.dtype))
