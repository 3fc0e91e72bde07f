"""Take the statistics of batch norms that train over the images of all processes.

With them a step does not depend on how its batch is split. For x [B, C, ...] of this process, of
whose images those of m [B] ∈ {0, 1} count, and sums over processes:

1. n = Σ m · positions;
2. mean_c = Σ m x / n;
3. var_c = Σ m (x − mean_c)² / n;
4. y = (x − mean_c) / √(var_c + eps) · weight_c + bias_c.

Running statistics follow as in :func:`torch.nn.functional.batch_norm`, with var · n / (n − 1).
Sums over processes are differentiable: the gradient of a sum is the sum of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def has_batch_norms(model: nn.Module) -> bool:
    """Whether a batch norm of the model is in training mode."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for module in model.modules()
    )


class SyncedBatchNorms(TorchFunctionMode):
    """Replace every :func:`torch.nn.functional.batch_norm` that trains, in a context.

    Args:
        valid: [B] bool, which images of this process count.
        group: the processes.
    """

    def __init__(self, valid: Tensor, group: dist.ProcessGroup):
        super().__init__()
        self._valid = valid
        self._group = group

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of PyTorch, or its replacement."""
        ours = self._batch_norm if func is F.batch_norm else func
        return ours(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        x = input
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            shape = [1, -1] + [1] * (x.dim() - 2)
            axes = [axis for axis in range(x.dim()) if axis != 1]
            mask = self._valid.float().view([-1] + [1] * (x.dim() - 1))
            positions = x[0, 0].numel()
            count = (self._valid.sum() * positions).float().reshape(1)
            first = _summed(torch.cat([(values * mask).sum(axes), count]), self._group)
            n = first[-1].detach()
            mean = first[:-1] / n
            centered = values - mean.view(shape)
            var = _summed((centered.square() * mask).sum(axes), self._group) / n
            y = centered * (var + eps).rsqrt().view(shape)
            if weight is not None:
                y = y * weight.float().view(shape)
            if bias is not None:
                y = y + bias.float().view(shape)
            with torch.no_grad():
                if running_mean is not None:
                    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                if running_var is not None:
                    unbiased = var * n / (n - 1).clamp(min=1)
                    running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return y.to(x.dtype)


class _Sum(torch.autograd.Function):
    """Add up over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _Sum.apply(values, group)  # type: ignore[no-any-return]
