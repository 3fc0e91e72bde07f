"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastadapt.config import MODEL
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings
from fastadapt.train.augment_config import AUGMENTATION, AugmentSettings
from fastadapt.train.run_settings import IMAGES
from fastadapt.train.run_settings import RUN as RUN
from fastadapt.train.run_settings import Decode as Decode
from fastadapt.train.run_settings import RunSettings as RunSettings
from fastadapt.train.run_settings import SavingSettings as SavingSettings

TRAINING, DECISION = "Training", "Probabilities and decisions"
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
# The adapter of the commands' default recipe, chosen on validation (docs/accuracy.md); that of
# fa.AdaptConfig and fa.CLAdapter is the paper's.
DEFAULT_ADAPTER: dict[str, Any] = {"rank": 64, "mlp_ratio": 0.25}
MOST_EPOCHS, MOST_IMAGES = 10_000_000, 10_000_000


def check_intensity_range(text: str) -> None:
    """Refuse a setting of the intensity range that is none of its forms.

    Raises:
        InputError: as said.
    """
    from fastadapt.data.intensity import IntensitySetting  # NumPy and Pillow: not for --help

    IntensitySetting.parse(text)


@dataclass(frozen=True)
class TrainConfig(AugmentSettings):
    """How to train. Two runs with equal settings, data and device kind give equal weights on CPU.

    The defaults are this library's; :meth:`paper` gives those of CLAdapter's code.

    ``cuda_graph="auto"`` captures a step (:class:`fastadapt.GraphedStep`) where a stage has at
    least 20 full batches, but not in fp16, whose loss is scaled. ``"off"`` is for models whose
    Python code does something else in every step; a run may be resumed with the other setting.
    ``augment`` and the settings after it give random views (:mod:`fastadapt.data.augment`): of the
    cached ones in stage 1, fresh ones in stage 2 and where nothing is cached.
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
    full: Annotated[
        bool,
        Setting(
            "Train everything in stage 1, the backbone too: with --adapter none, full fine-tuning.",
            panel=TRAINING,
        ),
    ] = False
    unfreeze_last: Annotated[
        int | None,
        Setting(
            "Train the backbone's last N blocks only, in stage 2 or with --full; all of it if not "
            "given.",
            panel=TRAINING,
            metavar="N",
            ge=1,
            limit=100_000,
        ),
    ] = None
    epochs: Annotated[
        int, Setting("Epochs of stage 1.", panel=TRAINING, ge=1, limit=MOST_EPOCHS)
    ] = 16
    lr: Annotated[
        float, Setting("Peak learning rate of stage 1.", panel=TRAINING, gt=0, limit=1e6)
    ] = 1e-3
    batch_size: Annotated[
        int,
        Setting(
            "Images in a step of stage 1, of all processes.",
            panel=TRAINING,
            ge=1,
            limit=MOST_IMAGES,
        ),
    ] = 32
    epochs2: Annotated[
        int, Setting("Epochs of stage 2.", panel=TRAINING, ge=1, limit=MOST_EPOCHS)
    ] = 10
    lr2: Annotated[
        float, Setting("Peak learning rate of stage 2.", panel=TRAINING, gt=0, limit=1e6)
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
            "Weight decay of the parameters that --decay says.",
            panel=TRAINING,
            ge=0,
            limit=1e6,
        ),
    ] = 0.2
    decay: Annotated[
        Literal["matrices", "all"],
        Setting(
            "Parameters with weight decay: matrices, not biases, norms and other vectors; or all.",
            panel=TRAINING,
        ),
    ] = "matrices"
    layer_decay: Annotated[
        float,
        Setting(
            "Learning rate of each of the backbone's layers, as a share of that of the layer "
            "after it, where the backbone trains.",
            panel=TRAINING,
            gt=0,
            le=1,
        ),
    ] = 1.0
    schedule: Annotated[
        Literal["cosine", "cladapter"],
        Setting(
            "Learning rates: warm-up from 0 and a cosine to 0 after it, or those of CLAdapter's "
            "code.",
            panel=TRAINING,
        ),
    ] = "cosine"
    warmup_epochs: Annotated[
        float,
        Setting("Epochs of linear warm-up in each stage.", panel=TRAINING, ge=0, limit=1e7),
    ] = 1.0
    drop_last: Annotated[
        bool,
        Setting("Leave a smaller last batch of an epoch out.", panel=TRAINING),
    ] = False
    clip_grad: Annotated[
        float | None,
        Setting(
            "Largest norm of the gradient; no limit if not given.", panel=TRAINING, gt=0, limit=1e9
        ),
    ] = None
    label_smoothing: Annotated[
        float,
        Setting("Share of the target that is spread over all classes.", panel=TRAINING, ge=0, lt=1),
    ] = 0.1
    mixup: Annotated[
        float,
        Setting(
            "Mix each training image with another one, by shares from Beta(mixup, mixup); of "
            "cached images the features are mixed.",
            panel=AUGMENTATION,
            ge=0,
            limit=1e3,
        ),
    ] = 0.0
    cutmix: Annotated[
        float,
        Setting(
            "Paste a rectangle of another training image, its share from Beta(cutmix, cutmix); "
            "with mixup, one of the two in each step.",
            panel=AUGMENTATION,
            ge=0,
            limit=1e3,
        ),
    ] = 0.0
    ema: Annotated[
        float,
        Setting(
            "Validate and keep an exponential moving average of the weights with this decay per "
            "step; 0 for none.",
            panel=TRAINING,
            ge=0,
            lt=1,
        ),
    ] = 0.99
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
            "Validation metric that decides which epoch is kept.",
            panel=TRAINING,
        ),
    ] = "macro_f1"
    ties: Annotated[
        Literal["loss", "later"],
        Setting(
            "Keep, of equal epochs, that of the lower validation loss, or the later one.",
            panel=TRAINING,
        ),
    ] = "loss"
    patience: Annotated[
        int | None,
        Setting(
            "End a stage after this many epochs without improvement; never if not given.",
            panel=TRAINING,
            ge=1,
            limit=1e7,
        ),
    ] = None
    refit: Annotated[
        bool,
        Setting(
            "When validation has judged, train again on training and validation images together "
            "for as many epochs, and keep that model; the default where that is quick: one stage "
            "on cached features.",
            panel=TRAINING,
        ),
    ] = False
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
            ge=0.001,
            lt=1,
        ),
    ] = 0.2
    calibrate: Annotated[
        bool,
        Setting(
            "Fit a temperature to validation, by which the saved model's logits are divided.",
            panel=DECISION,
        ),
    ] = True
    threshold: Annotated[
        Literal["none", "balanced_accuracy", "f1", "youden"],
        Setting(
            "Choose on validation from which probability the second of two classes is "
            "predicted: the best for this metric; none: the likelier class.",
            panel=DECISION,
        ),
    ] = "none"
    abstain: Annotated[
        float,
        Setting(
            "Share of the validation images, the least certain ones, whose like get no prediction.",
            panel=DECISION,
            ge=0,
            lt=1,
        ),
    ] = 0.0
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
    decode: Decode = "cpu"

    def check_together(self) -> None:
        """Refuse settings that exclude each other, and intensity ranges that are none."""
        check_intensity_range(self.intensity_range)
        if self.views > 1 and not self.augments:
            raise InputError(
                f"views is {self.views}, but augment is 'none', so all views would be the same: "
                "give `augment='flips'`, dihedral or crops"
            )
        if self.full and self.stages == 2:
            raise InputError(
                "stages is 2, but with `full=True` everything trains from the first one on: leave "
                "one of them out"
            )
        if self.unfreeze_last is not None and not (self.full or self.stages == 2):
            raise InputError(
                f"unfreeze_last is {self.unfreeze_last}, but the backbone stays frozen in stage 1: "
                "give `stages=2` or `full=True`, too"
            )

    @classmethod
    def default(cls, what: Literal["adapter", "head", "full"] = "adapter", **changes: Any) -> Self:
        """Return the default recipe of the command.

        Args:
            what: trains: ``"adapter"``, adapter and head, whose settings are the class's defaults
                and a refit; ``"head"``, the head alone, likewise; ``"full"``, everything.
            **changes: other values of some settings.
        """
        values: dict[str, Any] = {"refit": True}
        if what == "head":
            values |= {"epochs": 30, "lr": 5e-3, "weight_decay": 0.05}
        elif what == "full":
            values = {"full": True, "epochs": 15, "lr": 3e-4, "weight_decay": 0.05, "ema": 0.0}
        return cls(**(values | changes))

    @classmethod
    def paper(cls, mode: Literal["cla", "linear", "full"] = "cla", **changes: Any) -> Self:
        """Return the settings of CLAdapter's code.

        Three things are kept: a frozen backbone's batch norms stay in evaluation mode, an epoch
        of stage 1 that is better than all of stage 2 is kept, and mixed precision is bf16 where
        there is a GPU (upstream's is fp16).

        Args:
            mode: what trains, in upstream's words: ``"cla"``, the adapter, then everything;
                ``"linear"``, the head alone; ``"full"``, everything from the start.
            **changes: other values of some settings.

        Source: ``train.py`` and ``dataset.py`` of qklee-lz/CLAdapter with the options of its
        README.
        """
        values: dict[str, Any] = {
            "stages": 2 if mode == "cla" else 1,
            "full": mode == "full",
            "epochs": 100,
            "lr": 1e-4,
            "batch_size": 8,
            "epochs2": 100,
            "lr2": 1e-5,
            "optimizer": "adam",
            "weight_decay": 1e-3,
            "label_smoothing": 0.0,
            "ema": 0.0,
            "decay": "all",
            "schedule": "cladapter",
            "warmup_epochs": 2.0,
            "drop_last": True,
            "select": "accuracy",
            "ties": "later",
            "cache": False,
            "augment": "flips",
            "rotation": 180.0,
            "shift": 0.05,
            "scale": 0.3,
            "affine_probability": 0.7,
            "border": "black",
            "brightness": 0.1,
            "contrast": 0.1,
            "color_probability": 0.5,
            "seed": 1,
        }
        return cls(**(values | changes))

    def of_stage(self, stage: int) -> tuple[int, float, int]:
        """Return epochs, peak learning rate and batch size of a stage."""
        if stage == 1:
            return self.epochs, self.lr, self.batch_size
        return self.epochs2, self.lr2, self.batch_size2 or self.batch_size


@dataclass(frozen=True)
class RecipeChoice(Settings):
    """Whose settings a command starts from."""

    recipe: Annotated[
        Literal["default", "paper"],
        Setting(
            "Settings of options that are not given: this library's, or those of the paper's code "
            "to the letter.",
            panel=TRAINING,
        ),
    ] = "default"


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
            ge=8,
            limit=65_536,
        ),
    ] = None
    crop_pct: Annotated[
        float | None,
        Setting(
            "Share of the resized image that the crop keeps; the backbone's if not given.",
            panel=IMAGES,
            ge=0.01,
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

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the settings of CLAdapter's code: images are squashed into the size."""
        values: dict[str, Any] = {
            "crop_mode": "squash",
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        }
        return cls(**(values | changes))

    def preprocess(self) -> dict[str, Any]:
        """Return them as :func:`fastadapt.train.train` takes them; the size is the adapter's."""
        return {name: getattr(self, name) for name in ("crop_pct", "crop_mode", "interpolation")}
