"""Whether an operation of ours may stand for a module."""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Whether nothing but the class's own ``forward`` runs when the module is called.

    Not with hooks or another ``forward`` (folded, adapted), nor where a parameter is lacking.
    Hooks on all modules are another matter: :func:`has_global_hooks`.
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
    """Whether there are hooks on all modules, a profiler's for one."""
    return nn.modules.module._has_any_global_hook()
