"""Which modules of a network read which modules' outputs, observed during one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

Rule = Callable[[nn.Module], bool]


class HasBackbone(Protocol):
    """An adapted model, or several that share a backbone."""

    @property
    def backbone(self) -> Any:
        """The backbone."""

    def backbone_features(self, x: Tensor) -> Tensor:
        """Run it."""


def readers(
    model: HasBackbone, example: Tensor, is_maker: Rule, is_reader: Rule
) -> tuple[dict[nn.Module, nn.Module], Counter[nn.Module]]:
    """Return what each reader in the backbone reads, if a maker made it, and how often each ran.

    Args:
        model: whose backbone runs once.
        example: images [B, C, H, W].
        is_maker, is_reader: tell which modules are meant; no module is both.
    """
    # The tensor is held, so that its id is not reused.
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    calls: Counter[nn.Module] = Counter()
    found: dict[nn.Module, nn.Module] = {}

    def after_maker(maker: nn.Module, _: Any, output: Tensor) -> None:
        calls[maker] += 1
        made[id(output)] = (maker, output)

    def before_reader(reader: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[reader] += 1
        if id(inputs[0]) in made:
            found[reader] = made[id(inputs[0])][0]

    hooks = []
    for module in model.backbone.modules():
        if is_maker(module):
            hooks.append(module.register_forward_hook(after_maker))
        elif is_reader(module):
            hooks.append(module.register_forward_pre_hook(before_reader))
    model.backbone_features(example)
    for hook in hooks:
        hook.remove()
    return found, calls
