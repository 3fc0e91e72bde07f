"""The settings of ``fastadapt predict`` and ``fastadapt embed``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastadapt.data.decode_on import DECODE_HELP, DecodeOn
from fastadapt.device_list import DEVICES_HELP, METAVAR, check_devices, check_one_way
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings

OPTIONS, COLUMNS, WORK, EMBEDDER = "Options", "Columns", "Work", "Model"
FOLDERS = "folders"  # the value of --labels that is no column


@dataclass(frozen=True)
class PredictSettings(Settings):
    """What predicts, and what is written of it."""

    model: Annotated[
        str,
        Setting(
            "A bundle, or the run folder of a training.",
            panel=OPTIONS,
            metavar="BUNDLE|RUN",
            argument=True,
        ),
    ]
    labels: Annotated[
        str | None,
        Setting(
            "Take labels from this column of a CSV, or from the folders that images are in, write "
            "them as column target, and print how many predictions are right.",
            panel=COLUMNS,
            metavar="COLUMN|folders",
        ),
    ] = None
    task: Annotated[
        str | None,
        Setting(
            "Predict this task of a bundle that has several; all of them if not given, with a "
            "column prediction:TASK for each.",
            panel=OPTIONS,
            metavar="NAME",
        ),
    ] = None
    logits: Annotated[bool, Setting("Write the model's outputs, too.", panel=COLUMNS)] = False
    top_k: Annotated[
        int,
        Setting(
            "Write this many of the likeliest classes in order, too; 0 for none.",
            panel=COLUMNS,
            ge=0,
            limit=100_000,
        ),
    ] = 0
    embeddings: Annotated[
        bool,
        Setting(
            "Write the features before the head, too; of a bundle that was exported with "
            "--with-features.",
            panel=COLUMNS,
        ),
    ] = False


@dataclass(frozen=True)
class EmbedSettings(Settings):
    """What computes features."""

    model: Annotated[
        str,
        Setting(
            "The run folder of a training, a bundle that was exported with --with-features or "
            "--features, or timm's name of a backbone. A folder that exists wins over a name.",
            panel=OPTIONS,
            metavar="RUN|BACKBONE|BUNDLE",
            argument=True,
        ),
    ]
    weights: Annotated[
        str | None,
        Setting(
            "File of the backbone's weights, if they are not timm's, or not where training found "
            "them.",
            panel=EMBEDDER,
            metavar="FILE",
        ),
    ] = None
    image_size: Annotated[
        int | None,
        Setting(
            "Height and width of the images of a named backbone in pixels, if not timm's.",
            panel=EMBEDDER,
            ge=8,
            limit=8_192,
        ),
    ] = None


@dataclass(frozen=True)
class WorkSettings(Settings):
    """Which images are read, where the results go, and what the work may take."""

    images: Annotated[
        tuple[str, ...],
        Setting(
            "Folders, image files, patterns, lists of files (.txt, .lst), tables with a column "
            "path (.csv, .tsv), or - for a list on standard input.",
            panel=OPTIONS,
            metavar="IMAGES",
            argument=True,
        ),
    ]
    out: Annotated[
        Path,
        Setting("File of the results: .csv, .jsonl or .parquet.", panel=OPTIONS, metavar="FILE"),
    ]
    batch: Annotated[
        int, Setting("Images that are computed at once.", panel=WORK, ge=1, limit=4_096)
    ] = 32
    workers: Annotated[
        int | None,
        Setting(
            "Processes that decode images; one per core if not given.",
            panel=WORK,
            ge=1,
            limit=4_096,
        ),
    ] = None
    device: Annotated[str, Setting("Device to compute on: auto, cpu, cuda or cuda:1.", WORK)] = (
        "auto"
    )
    devices: Annotated[
        str | tuple[str, ...] | None,
        Setting(
            "Spread the images over these devices, one process each: " + DEVICES_HELP,
            panel=WORK,
            kind=str,
            metavar=METAVAR,
            shown_default="one device",
        ),
    ] = None
    decode: Annotated[
        DecodeOn,
        Setting(DECODE_HELP, panel=WORK, expected="cpu or gpu"),
    ] = "cpu"
    executor: Annotated[
        Literal["local", "ray"],
        Setting(
            "What runs the work: this machine's processes, or Ray Data's workers, one GPU each.",
            panel=WORK,
            expected="local or ray",
        ),
    ] = "local"
    ray_address: Annotated[
        str | None,
        Setting(
            "With --executor ray: the cluster (auto, or ray://HOST:PORT); one on this machine if "
            "not given.",
            panel=WORK,
            metavar="ADDRESS",
        ),
    ] = None
    ray_workers: Annotated[
        int | None,
        Setting(
            "With --executor ray: number of workers; one for each GPU if not given, or one for "
            "each core where there is no GPU.",
            panel=WORK,
            ge=1,
            limit=100_000,
        ),
    ] = None
    trust: Annotated[
        bool,
        Setting(
            "Run native code (.pt2, TensorRT engines) of a bundle that was not made on this "
            "machine: trust its maker.",
            panel=WORK,
        ),
    ] = False
    resume: Annotated[
        bool, Setting("Go on from the finished parts of an interrupted command.", panel=WORK)
    ] = False
    overwrite: Annotated[
        bool, Setting("Replace the results that are there, finished or not.", panel=WORK)
    ] = False
    quiet: Annotated[bool, Setting("Print errors only.", panel=WORK)] = False

    def check_together(self) -> None:
        """Refuse settings that exclude each other."""
        if not self.images:
            raise InputError("there are no images: name a folder, files, a table or a list")
        if self.resume and self.overwrite:
            raise InputError("`resume` keeps what is there and `overwrite` does not: give one")
        if self.devices is not None:
            check_devices(self.devices)
        check_one_way(self.device, self.devices)
        if self.executor == "ray" and (self.devices or self.device != "auto"):
            raise InputError("Ray chooses devices itself: leave out `device` and `devices`")
        if self.executor != "ray" and (self.ray_address or self.ray_workers):
            raise InputError("`ray_address` and `ray_workers` are for `executor='ray'`")
        if self.images.count("-") > 1:
            raise InputError("standard input (-) can be read once: name it once")
