"""The settings of a run that its trained weights do not depend on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastadapt.config import MODEL
from fastadapt.data.decode_on import DECODE_HELP, DecodeOn
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings

IMAGES, RUN = "Images and features", "Run"
DATA_HELP = (
    "A folder of class folders, one with train/, val/ (and test/) of such folders, or a CSV with "
    "path, label and optionally split (train, val, test)."
)

Decode = Annotated[
    DecodeOn,
    Setting(
        f"{DECODE_HELP} It holds for images that are kept decoded, too.",
        panel=IMAGES,
        expected="cpu or gpu",
    ),
]


@dataclass(frozen=True)
class RunSettings(Settings):
    """What a run reads and writes, and on which device; the trained weights do not depend on it."""

    data: Annotated[Path | None, Setting(DATA_HELP, panel=RUN, metavar="DATA", argument=True)]
    out: Annotated[Path, Setting("The run folder; new or empty.", panel=RUN)]
    device: Annotated[str, Setting("Device to train on: auto, cpu, cuda or cuda:1.", panel=RUN)] = (
        "auto"
    )
    workers: Annotated[
        int | None,
        Setting(
            "Processes that decode images; one per core if not given.",
            panel=RUN,
            ge=0,
            limit=4_096,
        ),
    ] = None
    skip_unreadable: Annotated[
        bool,
        Setting("Leave damaged images out instead of refusing the data set.", panel=IMAGES),
    ] = False
    resume: Annotated[
        bool,
        Setting(
            "Continue the run after its last completed epoch; train --resume --out RUN is enough.",
            panel=RUN,
        ),
    ] = False
    overwrite: Annotated[
        bool,
        Setting(
            "Replace the run that is there; its files stay until the new run has its first ones.",
            panel=RUN,
        ),
    ] = False
    quiet: Annotated[bool, Setting("Print errors only.", panel=RUN)] = False

    @property
    def dataset(self) -> Path:
        """The data set, which every command but ``train --resume`` needs."""
        if self.data is None:
            raise InputError("DATA is missing: name a folder of class folders, or a CSV")
        return self.data


@dataclass(frozen=True)
class SavingSettings(Settings):
    """How often the state of a run is written, and whether its seconds are told."""

    save_every: Annotated[
        float,
        Setting(
            "Least seconds between two states on disk, from which --resume continues; 0: after "
            "every epoch. Ctrl-C saves, too.",
            panel=RUN,
            ge=0,
            limit=1e9,
        ),
    ] = 30.0
    profile: Annotated[
        bool, Setting("Print where the seconds went, and write them to profile.json.", panel=RUN)
    ] = False


@dataclass(frozen=True)
class StartSettings(Settings):
    """What training starts from, if not from new weights beside the backbone's."""

    init: Annotated[
        Path | None,
        Setting(
            "Start from what this run trained, on its backbone with its settings of the model; the "
            "head too, if its classes are those of DATA.",
            panel=MODEL,
            metavar="RUN",
        ),
    ] = None
