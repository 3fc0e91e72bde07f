"""Say what a search varies, and turn what was drawn into settings.

A setting that the caller gave is held. The learning rate and the decay are drawn on a logarithmic
scale, everything else from a list.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastadapt.config import AdaptConfig
from fastadapt.settings import declared
from fastadapt.train.augment_config import AugmentSettings
from fastadapt.train.config import TrainConfig

Value = float | int | str


class Choices(NamedTuple):
    """Values to choose from."""

    values: tuple[Value, ...]


class Between(NamedTuple):
    """A range of numbers, drawn on a logarithmic scale."""

    low: float
    high: float


SPACE: dict[str, Choices | Between] = {
    "adapter": Choices(("cladapter", "none")),
    "rank": Choices((16, 32, 64, 128, 256)),
    "mlp_ratio": Choices((0.125, 0.25, 0.5, 1.0, 2.0)),
    "depth": Choices((1, 2)),
    "num_centers": Choices((5, 10, 20, 40)),
    "proj_drop": Choices((0.0, 0.1, 0.3)),
    "lr": Between(1e-4, 1e-2),
    "weight_decay": Between(1e-3, 1.0),
    "label_smoothing": Choices((0.0, 0.05, 0.1, 0.2)),
    "mixup": Choices((0.0, 0.2)),
    "epochs": Choices((4, 8, 16, 30)),
}
# On a CPU an adapter should not take longer than the frozen backbone, nor a trial minutes.
SMALLER: dict[str, Choices | Between] = {
    "rank": Choices((16, 32, 64, 128)),
    "mlp_ratio": Choices((0.125, 0.25, 0.5)),
    "epochs": Choices((4, 8, 16)),
}
OF_ADAPTER = ("adapter", "rank", "mlp_ratio", "depth", "num_centers", "proj_drop")


@dataclass(frozen=True)
class Space:
    """What is varied, around settings that are held.

    Attributes:
        varied: by name of the setting.
        config: of the training; varied settings have its values in the first trial.
        adapt_config: of the adapter; likewise.
    """

    varied: dict[str, Choices | Between]
    config: TrainConfig
    adapt_config: AdaptConfig

    @classmethod
    def around(
        cls,
        config: TrainConfig,
        adapt_config: AdaptConfig,
        held: Collection[str] = (),
        backbones: Collection[str] = (),
        *,
        small: bool = False,
    ) -> Space:
        """Return the space around some settings.

        Args:
            config, adapt_config: the settings.
            held: names of those that are not varied.
            backbones: names to choose from; one is no choice.
            small: leave out what takes long on a CPU.
        """
        everything = SPACE | (SMALLER if small else {})
        varied = {name: choice for name, choice in everything.items() if name not in held}
        if adapt_config.adapter == "none" and "adapter" in held:
            varied = {name: choice for name, choice in varied.items() if name not in OF_ADAPTER}
        if config.augments and config.views > 1 and "views" not in held:
            varied["views"] = Choices((1, config.views))
        if len(backbones) > 1:
            varied["backbone"] = Choices(tuple(backbones))
        return cls(varied, config, adapt_config)

    def suggest(self, trial: Any) -> dict[str, Value]:
        """Draw all values of an optuna trial: also those that an adapter of none has no use for."""
        drawn: dict[str, Value] = {}
        for name, choice in self.varied.items():
            if isinstance(choice, Between):
                drawn[name] = trial.suggest_float(name, choice.low, choice.high, log=True)
            else:
                drawn[name] = trial.suggest_categorical(name, list(choice.values))
        return drawn

    def settings(self, drawn: dict[str, Value]) -> tuple[TrainConfig, AdaptConfig]:
        """Return the settings that drawn values stand for."""
        adapter: dict[str, Any] = {n: value for n, value in drawn.items() if n in OF_ADAPTER}
        training: dict[str, Any] = {
            name: value
            for name, value in drawn.items()
            if name not in OF_ADAPTER and name != "backbone"
        }
        if training.get("views") == 1:
            training |= {field.name: field.default for field in declared(AugmentSettings)}
        return replace(self.config, **training), replace(self.adapt_config, **adapter)

    def first(self) -> list[dict[str, Value]]:
        """Return the trials to begin with: the settings as given, and the head alone."""
        given: dict[str, Value] = {}
        for name, choice in self.varied.items():
            source = self.adapt_config if name in OF_ADAPTER else self.config
            value = getattr(source, name, None)
            if isinstance(choice, Between):
                value = min(max(value or choice.low, choice.low), choice.high)
            elif value not in choice.values:
                value = nearest(value, choice.values)
            given[name] = value
        if "adapter" not in self.varied:
            return [given]
        head = {**given, "adapter": "none", "lr": 5e-3, "weight_decay": 0.05}
        longest = self.varied.get("epochs")
        if isinstance(longest, Choices):
            head["epochs"] = longest.values[-1]
        return [given, {name: value for name, value in head.items() if name in self.varied}]


def nearest(value: Any, values: tuple[Value, ...]) -> Value:
    """Return the number of a list that is nearest to a value; the first where it is no number."""
    numbers = [other for other in values if isinstance(other, int | float)]
    if not isinstance(value, int | float) or not numbers:
        return values[0]
    return min(numbers, key=lambda other: abs(other - value))
