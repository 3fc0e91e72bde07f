"""Check that a module is what its class says, so that a fused operation may replace its call."""

from __future__ import annotations

from torch import nn


def is_unmodified(module: nn.Module) -> bool:
    """Tell whether calling a module runs its class's own ``forward`` and nothing else.

    It does not with hooks, with a ``forward`` of the instance (folded, adapted), or where a
    parameter is missing. For hooks on all modules see :func:`has_global_hooks`.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or any(parameter is None for parameter in module._parameters.values())
    )


def has_global_hooks() -> bool:
    """Tell whether there are hooks on all modules (a profiler's, say)."""
    return nn.modules.module._has_any_global_hook()
