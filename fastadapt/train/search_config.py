"""The settings of a search for the best recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from fastadapt.device_list import DEVICES_HELP, METAVAR, check_devices
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings

SEARCH = "Search"


class NamedBackbone(NamedTuple):
    """A backbone by timm's name, with a local file of weights or timm's own."""

    name: str
    weights: Path | None


@dataclass(frozen=True)
class SearchConfig(Settings):
    """How to search."""

    trials: Annotated[
        int, Setting("Settings to try, those of a resumed search included.", SEARCH, ge=1, le=10**6)
    ] = 100
    folds: Annotated[
        int,
        Setting(
            "Folds of the training and validation images that score a setting.",
            SEARCH,
            ge=2,
            le=100,
        ),
    ] = 5
    timeout: Annotated[
        float | None,
        Setting(
            "Seconds after which no new trial begins; no limit if not given.",
            SEARCH,
            gt=0,
            limit=1e9,
        ),
    ] = None
    backbones: Annotated[
        str | None,
        Setting(
            "Backbones to choose from, instead of --backbone; each timm's name, or NAME=FILE with "
            "local weights.",
            SEARCH,
            metavar="A,B",
        ),
    ] = None
    jobs: Annotated[
        int | None,
        Setting(
            "Trials at once, each in a process of its own; one for each of --devices if not given, "
            "and without them one for each core, or one on a GPU.",
            SEARCH,
            ge=1,
            le=1024,
        ),
    ] = None
    devices: Annotated[
        str | tuple[str, ...] | None,
        Setting(
            "Run trials beside each other, one process on each of these devices (with --jobs in "
            "turn); features and the last run take the first: " + DEVICES_HELP,
            SEARCH,
            kind=str,
            metavar=METAVAR,
        ),
    ] = None
    positions: Annotated[
        int | None,
        Setting(
            "Positions of a feature map that trials see at most, pooled; 4 on a CPU and all on a "
            "GPU if not given. The final run sees all.",
            SEARCH,
            ge=1,
            limit=1e7,
        ),
    ] = None
    prune: Annotated[
        bool, Setting("End a trial whose first folds are worse than those of others.", SEARCH)
    ] = True
    confirm: Annotated[
        int,
        Setting(
            "Best settings that are scored again, on other folds, before one is chosen.",
            SEARCH,
            ge=0,
            le=100,
        ),
    ] = 3

    def check_together(self) -> None:
        """Refuse devices that cannot be."""
        if self.devices is not None:
            check_devices(self.devices)

    def named_backbones(self, backbone: str | None, weights: Path | None) -> list[NamedBackbone]:
        """Return the backbones to choose from.

        Args:
            backbone, weights: of ``--backbone`` and ``--weights``.

        Raises:
            InputError: none or both ways are given, or a name stands there twice.
        """
        if (backbone is None) == (self.backbones is None):
            raise InputError(
                "search needs --backbone NAME, or --backbones A,B to choose from, and not both"
            )
        if self.backbones is None:
            assert backbone is not None
            return [NamedBackbone(backbone, weights)]
        if weights is not None:
            raise InputError("--weights goes with --backbone: give --backbones NAME=FILE,NAME=FILE")
        found = []
        for part in self.backbones.split(","):
            name, _, file = part.strip().partition("=")
            if not name:
                raise InputError(f"backbones is {self.backbones!r}; expected names with commas")
            found.append(NamedBackbone(name, Path(file) if file else None))
        names = [item.name for item in found]
        if len(set(names)) < len(names):
            raise InputError(f"backbones is {self.backbones!r}, which names one twice")
        return found
