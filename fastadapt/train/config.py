"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastadapt.config import MODEL
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings

TRAINING, IMAGES, RUN = "Training", "Images and features", "Run"
DATA_HELP = (
    "A folder of class folders, one with train/, val/ (and test/) of such folders, or a CSV with "
    "path, label and optionally split (train, val, test)."
)
IntensityRange = Annotated[
    str,
    Setting(
        "Pixel values that become black and white: those of the files' type (dtype), of as many "
        "bits as the training images fill (auto), two values (0:4095), or two percentiles of all "
        "training pixels (0.5%:99.5%).",
        panel=IMAGES,
        metavar="dtype|auto|LOW:HIGH|P%:Q%",
    ),
]
MOST_EPOCHS, MOST_IMAGES = 10_000_000, 10_000_000


def check_intensity_range(text: str) -> None:
    """Refuse a setting of the intensity range that is none of its forms.

    Raises:
        InputError: as said.
    """
    from fastadapt.data.intensity import IntensitySetting  # NumPy and Pillow: not for --help

    IntensitySetting.parse(text)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How to train. Two runs with equal settings, data and device kind give equal weights on CPU.

    ``cuda_graph="auto"`` captures a step (:class:`fastadapt.GraphedStep`) where a stage has at
    least 20 full batches, but not in fp16, whose loss is scaled. ``"off"`` is for models whose
    Python code does something else in every step; a run may be resumed with the other setting.
    ``augment`` gives random views (:mod:`fastadapt.data.augment`): of the cached ones in stage 1,
    fresh ones in stage 2 and where nothing is cached.
    """

    stages: Annotated[
        int,
        Setting(
            "Train in 1 stage: what was added to the frozen backbone; or in 2: then everything, "
            "from the best of the first.",
            panel=TRAINING,
            ge=1,
            le=2,
            expected="1 or 2",
        ),
    ] = 1
    epochs: Annotated[
        int, Setting("Epochs of stage 1.", panel=TRAINING, ge=1, limit=MOST_EPOCHS)
    ] = 30
    lr: Annotated[
        float, Setting("Peak learning rate of stage 1.", panel=TRAINING, gt=0, limit=1e38)
    ] = 1e-3
    batch_size: Annotated[
        int, Setting("Images in a step of stage 1.", panel=TRAINING, ge=1, limit=MOST_IMAGES)
    ] = 32
    epochs2: Annotated[
        int, Setting("Epochs of stage 2.", panel=TRAINING, ge=1, limit=MOST_EPOCHS)
    ] = 10
    lr2: Annotated[
        float, Setting("Peak learning rate of stage 2.", panel=TRAINING, gt=0, limit=1e38)
    ] = 1e-5
    batch_size2: Annotated[
        int | None,
        Setting(
            "Images in a step of stage 2; as in stage 1 if not given.",
            panel=TRAINING,
            ge=1,
            limit=MOST_IMAGES,
        ),
    ] = None
    optimizer: Annotated[
        Literal["adamw", "adam"], Setting("Optimizer of both stages.", panel=TRAINING)
    ] = "adamw"
    weight_decay: Annotated[
        float,
        Setting(
            "Weight decay of matrices; biases, norms and other vectors have none.",
            panel=TRAINING,
            ge=0,
        ),
    ] = 0.01
    warmup_epochs: Annotated[
        float,
        Setting(
            "Epochs of linear warm-up in each stage; a cosine to 0 follows, step by step.",
            panel=TRAINING,
            ge=0,
        ),
    ] = 1.0
    clip_grad: Annotated[
        float | None,
        Setting("Largest norm of the gradient; no limit if not given.", panel=TRAINING, gt=0),
    ] = None
    label_smoothing: Annotated[
        float,
        Setting("Share of the target that is spread over all classes.", panel=TRAINING, ge=0, lt=1),
    ] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"],
        Setting(
            "Weight the loss by the inverse of a class's frequency (balanced), or not.",
            panel=TRAINING,
        ),
    ] = "none"
    amp: Annotated[
        Literal["auto", "off", "bf16", "fp16"],
        Setting(
            "Mixed precision; auto: on a GPU bf16, or fp16 where it has no bf16, else off.",
            panel=TRAINING,
        ),
    ] = "auto"
    cuda_graph: Annotated[
        Literal["auto", "off"],
        Setting("Replay training steps as CUDA graphs; auto: on a GPU.", panel=TRAINING),
    ] = "auto"
    select: Annotated[
        Literal["macro_f1", "accuracy", "loss"],
        Setting(
            "Validation metric that decides which epoch is kept; of equal ones that of the lower "
            "loss.",
            panel=TRAINING,
        ),
    ] = "macro_f1"
    patience: Annotated[
        int | None,
        Setting(
            "End a stage after this many epochs without improvement; never if not given.",
            panel=TRAINING,
            ge=1,
        ),
    ] = None
    augment: Annotated[
        Literal["none", "flips", "dihedral", "crops"],
        Setting(
            "Random views of training images: flips, the square's symmetries (dihedral), or "
            "crops with flips.",
            panel=IMAGES,
        ),
    ] = "none"
    views: Annotated[
        int,
        Setting(
            "Cached views of each training image, the plain one first.",
            panel=IMAGES,
            ge=1,
            limit=1_000_000,
        ),
    ] = 1
    cache: Annotated[
        bool,
        Setting("Compute the frozen backbone's features once, and keep them on disk.", IMAGES),
    ] = True
    feature_dtype: Annotated[
        Literal["auto", "fp16", "fp32"],
        Setting(
            "Type of the cached features; auto: fp16 unless a value exceeds its range.",
            panel=IMAGES,
        ),
    ] = "auto"
    val_fraction: Annotated[
        float,
        Setting(
            "Share of each class's training images to validate on, where DATA has no val split.",
            panel=IMAGES,
            ge=0,
            le=1,
            expected="more than 0, less than 1",
        ),
    ] = 0.2
    val_fold: Annotated[
        str | None,
        Setting(
            "Validate on this fold of the CSV's column fold, and train on the others.",
            panel=IMAGES,
            metavar="NAME",
        ),
    ] = None
    test_fold: Annotated[
        str | None,
        Setting("Test on this fold of the CSV's column fold.", panel=IMAGES, metavar="NAME"),
    ] = None
    probe: Annotated[
        bool,
        Setting(
            "Beside the result, fit a linear probe (logistic regression) to the cached features.",
            panel=TRAINING,
        ),
    ] = True
    seed: Annotated[
        int, Setting("Seed of everything that is random.", panel=TRAINING, ge=0, limit=2**63 - 1)
    ] = 0
    intensity_range: IntensityRange = "dtype"

    def check_together(self) -> None:
        """Refuse views that would all be the same, and intensity ranges that are none."""
        check_intensity_range(self.intensity_range)
        if self.views > 1 and self.augment == "none":
            raise InputError(
                f"views is {self.views}, but augment is 'none', so all views would be the same: "
                "give `augment='flips'`, dihedral or crops"
            )

    def of_stage(self, stage: int) -> tuple[int, float, int]:
        """Return epochs, peak learning rate and batch size of a stage."""
        if stage == 1:
            return self.epochs, self.lr, self.batch_size
        return self.epochs2, self.lr2, self.batch_size2 or self.batch_size


@dataclass(frozen=True)
class BackboneSource(Settings):
    """Where the backbone and its weights come from."""

    backbone: Annotated[
        str | None, Setting("timm's name of the backbone.", panel=MODEL, metavar="NAME")
    ] = None
    weights: Annotated[
        Path | None,
        Setting("Local file of the backbone's weights, instead of timm's.", panel=MODEL),
    ] = None
    pretrained: Annotated[
        bool, Setting("Start from timm's weights, or from random ones.", panel=MODEL)
    ] = True


@dataclass(frozen=True)
class ImageSettings(Settings):
    """How images are resized and cropped where that is not as the backbone was trained."""

    image_size: Annotated[
        int | None,
        Setting(
            "Height and width of the images, in pixels; the backbone's if not given.",
            panel=IMAGES,
            ge=1,
            limit=65_536,
        ),
    ] = None
    crop_pct: Annotated[
        float | None,
        Setting(
            "Share of the resized image that the crop keeps; the backbone's if not given.",
            panel=IMAGES,
            gt=0,
            le=1,
        ),
    ] = None
    crop_mode: Annotated[
        Literal["center", "squash", "border"] | None,
        Setting(
            "Crop the centre, squash the image into the size, or add a border; the backbone's way "
            "if not given.",
            panel=IMAGES,
        ),
    ] = None
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos"] | None,
        Setting("Filter for resizing; the backbone's if not given.", panel=IMAGES),
    ] = None


@dataclass(frozen=True)
class RunSettings(Settings):
    """What a run reads and writes, and on which device; the trained weights do not depend on it."""

    data: Annotated[Path, Setting(DATA_HELP, panel=RUN, metavar="DATA", argument=True)]
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
        bool, Setting("Continue the run after its last completed epoch.", panel=RUN)
    ] = False
    overwrite: Annotated[
        bool,
        Setting(
            "Replace the run that is there; its files stay until the new run has its first ones.",
            panel=RUN,
        ),
    ] = False
    quiet: Annotated[bool, Setting("Print errors only.", panel=RUN)] = False


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
