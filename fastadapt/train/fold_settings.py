"""The settings of training on folds and with several seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastadapt.device_list import DEVICES_HELP, METAVAR, check_devices
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings
from fastadapt.train.config import TrainConfig

if TYPE_CHECKING:
    from fastadapt.data.dataset import Dataset

FOLDS = "Folds"
MOST_SEEDS = 1000


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of "1,2,3", or of a count: "3" is 0,1,2."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if len(words) > 1 and not words[-1]:
        del words[-1]  # "3," is the one seed, not the count
    if not all(word.isdecimal() and len(word) < 19 for word in words):
        raise InputError(f"seeds is {text!r}; expected a count, or numbers such as 1,2,3")
    numbers = tuple(map(int, words))
    if len(numbers) == 1 and "," not in text:
        if not 1 <= numbers[0] <= MOST_SEEDS:
            raise InputError(f"seeds is {numbers[0]}; expected 1 to {MOST_SEEDS} seeds")
        return tuple(range(numbers[0]))
    return numbers


@dataclass(frozen=True)
class FoldSettings(Settings):
    """How many models are trained on which parts of the data."""

    folds: Annotated[
        int | None,
        Setting(
            "Train once for each of so many folds: it tests, the next one validates, the others "
            "train. Drawn by class, and by the CSV's column group; or those of its column fold.",
            panel=FOLDS,
            ge=3,
            le=1000,
        ),
    ] = None
    seeds: Annotated[
        tuple[int, ...],
        Setting(
            "Train with several seeds, a count or 1,2,3, on the same splits, which --seed draws.",
            panel=FOLDS,
            metavar="COUNT|N,N,…",
            kind=str,
            parse=parse_seeds,
            expected="different numbers, 0 or more",
        ),
    ] = ()

    devices: Annotated[
        str | tuple[str, ...] | None,
        Setting(
            "Train folds and seeds beside each other, one process on each of these devices: "
            + DEVICES_HELP,
            panel=FOLDS,
            kind=str,
            metavar=METAVAR,
        ),
    ] = None

    def check_together(self) -> None:
        """Refuse seeds that are no different numbers from 0 on."""
        if len(set(self.seeds)) < len(self.seeds) or any(not 0 <= s < 2**63 for s in self.seeds):
            listed = ",".join(map(str, self.seeds))
            raise InputError(f"seeds is {listed}; expected different numbers, 0 or more")
        if self.devices is not None:
            check_devices(self.devices)
        if self.devices is not None and not self.several:
            raise InputError(
                f"devices is {self.devices!r}, which goes with `folds` and `seeds`; one model is "
                "trained on several GPUs by torchrun --nproc-per-node N -m fastadapt train"
            )

    @property
    def several(self) -> bool:
        """Whether more than one model is asked for."""
        return self.folds is not None or bool(self.seeds)


def dataset_of(
    data: str | Path, config: TrainConfig, folds: FoldSettings = FoldSettings()
) -> Dataset:
    """List the images that folds are drawn of, or, without folds, split them.

    Raises:
        InputError: as for :func:`fastadapt.data.dataset.read_dataset`; folds that are given twice.
    """
    from fastadapt.data.dataset import read_dataset, read_unsplit  # NumPy: not for --help

    if folds.folds is None:
        return read_dataset(
            data,
            config.val_fraction,
            config.seed,
            val_fold=config.val_fold,
            test_fold=config.test_fold,
        )
    if config.val_fold is not None or config.test_fold is not None:
        raise InputError("`folds` takes every fold in turn: leave out `val_fold` and `test_fold`")
    return read_unsplit(data)
