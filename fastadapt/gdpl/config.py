"""The settings of GDPL: what is added to a CLIP model, its frozen parts, and the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastadapt.config import MODEL
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings
from fastadapt.train.augment_config import AUGMENT, AugmentSettings
from fastadapt.train.config import (
    IMAGES,
    MOST_EPOCHS,
    MOST_IMAGES,
    RUN,
    TRAINING,
    IntensityRange,
    check_intensity_range,
)

PROMPTS, DOMAIN = "Prompts", "Domain features"


@dataclass(frozen=True)
class GDPLConfig(Settings):
    """What GDPL adds to a CLIP model.

    The defaults are the paper's for base-to-novel transfer, but for ``deep_start`` and for the
    noise, which the paper's code adds to predictions, too. :meth:`paper` gives the paper's.
    """

    n_ctx: Annotated[
        int,
        Setting("Prompt tokens in each layer.", panel=PROMPTS, option="prompts", ge=1, limit=4_096),
    ] = 2
    depth: Annotated[
        int,
        Setting(
            "Layers of both branches that get prompts.",
            panel=PROMPTS,
            option="prompt_depth",
            ge=1,
            limit=4_096,
        ),
    ] = 9
    rank: Annotated[
        int,
        Setting(
            "Rank of the low-rank updates; 0 for none.",
            panel=PROMPTS,
            option="low_rank",
            ge=0,
            limit=65_536,
        ),
    ] = 4
    alpha: Annotated[
        float,
        Setting(
            "Scale the low-rank updates by alpha / rank.",
            panel=PROMPTS,
            option="low_rank_alpha",
            limit=1e9,
        ),
    ] = 1.0
    rank_depth: Annotated[
        int,
        Setting(
            "Layers of both branches that get low-rank updates; those with prompts if not given "
            "on the command line.",
            panel=PROMPTS,
            option="low_rank_depth",
            ge=0,
            limit=4_096,
        ),
    ] = 9
    deep_start: Annotated[
        Literal["independent", "cloned"],
        Setting(
            "Draw the start of the deep vision layers' quaternion networks for each layer "
            "(independent), or once for all (cloned), as the paper's code does.",
            panel=PROMPTS,
        ),
    ] = "independent"
    hidden: Annotated[
        int | None,
        Setting(
            "Width of the network that reads the domain feature; the feature's / 16 if None.",
            ge=1,
            limit=1_000_000,
        ),
    ] = None
    noise: Annotated[
        Literal["train", "always", "off"],
        Setting(
            "Add noise to the text prompt: in training, always (then predictions are random, too), "
            "or never (off).",
            panel=PROMPTS,
        ),
    ] = "train"
    template: Annotated[
        str, Setting("Text around a class name, which stands for {}.", panel=PROMPTS)
    ] = "a photo of a {}."
    class_chunk: Annotated[
        int,
        Setting(
            "Classes per text tree (fastadapt.gdpl.class_tree.ClassPrompts).",
            ge=1,
            limit=100_000_000,
        ),
    ] = 128

    @classmethod
    def paper(cls, train_classes: Literal["base", "all"] = "base", **changes: Any) -> Self:
        """Return the settings of the paper's code; noise stays out of predictions.

        Args:
            train_classes: as in :meth:`GDPLTrainConfig.paper`.
            **changes: other values of some settings.
        """
        values: dict[str, Any] = {"deep_start": "cloned"}
        if train_classes == "all":
            values["depth"] = 3  # and 9 layers with low-rank updates, as in the code
        return cls(**(values | changes))

    @classmethod
    def from_dict(cls, values: Any, where: str = "the GDPL configuration") -> Self:
        """Make the settings from what a file holds; see :meth:`Settings.from_dict`."""
        return super().from_dict(values, where)


@dataclass(frozen=True)
class FrozenParts(Settings):
    """Where the frozen parts of a GDPL model come from: the CLIP model and the domain encoder."""

    clip: Annotated[
        str,
        Setting(
            "open_clip's name of the CLIP model: ViT-B-16, hf-hub:… or local-dir:….",
            panel=MODEL,
            metavar="NAME",
        ),
    ]
    clip_weights: Annotated[
        str | None,
        Setting(
            "open_clip's tag of the CLIP model's weights (laion2b_s34b_b88k), or a local file; not "
            "for hf-hub: and local-dir:, which bring their own.",
            panel=MODEL,
            metavar="TAG|FILE",
        ),
    ]
    domain_encoder: Annotated[
        str | int,
        Setting(
            "timm's name of a model that knows the domain (in Python also the width of features "
            "that every call passes).",
            panel=DOMAIN,
            metavar="NAME",
            kind=str,
            expected="timm's name or a width",
        ),
    ]
    domain_weights: Annotated[
        str | None,
        Setting(
            "Local file of the domain encoder's weights, instead of timm's.",
            panel=DOMAIN,
            kind=Path,
            parse=lambda path: str(path.absolute()),
        ),
    ] = None
    domain_normalization: Annotated[
        Literal["clip", "own"],
        Setting(
            "Normalise the domain encoder's images as CLIP's, which the paper's code does, or as "
            "its own.",
            panel=DOMAIN,
        ),
    ] = "clip"
    domain_size: Annotated[
        int | None,
        Setting(
            "Height and width of the domain encoder's images, in pixels; its own if not given.",
            panel=DOMAIN,
            ge=8,
            limit=65_536,
        ),
    ] = None


@dataclass(frozen=True)
class GDPLTrainConfig(AugmentSettings):
    """How to train. The defaults are this library's; :meth:`paper` gives the paper's.

    The validation split is evaluated where the data set has no test split; it selects nothing: the
    last epoch is kept, as in the paper. Evaluations with at least 20 full batches of 32 images
    replay CUDA graphs, too.
    """

    shots: Annotated[
        int,
        Setting("Training images per class; 0 for all.", panel=TRAINING, ge=0, limit=MOST_IMAGES),
    ] = 16
    train_classes: Annotated[
        Literal["base", "all"],
        Setting(
            "Train on the first half of the classes and measure both halves (base), or on all, as "
            "for transfer to other data sets.",
            panel=TRAINING,
        ),
    ] = "base"
    epochs: Annotated[
        int, Setting("Epochs of training.", panel=TRAINING, ge=1, limit=MOST_EPOCHS)
    ] = 15
    lr: Annotated[float, Setting("Peak learning rate.", panel=TRAINING, gt=0, limit=1e6)] = 3.5e-3
    batch_size: Annotated[
        int, Setting("Images in a training step.", panel=TRAINING, ge=1, limit=MOST_IMAGES)
    ] = 4
    optimizer: Annotated[
        Literal["sgd", "adamw"],
        Setting("Optimizer: SGD with momentum 0.9, or AdamW.", panel=TRAINING),
    ] = "sgd"
    weight_decay: Annotated[
        float, Setting("Weight decay of all that trains.", panel=TRAINING, ge=0, limit=1e6)
    ] = 5e-4
    clip_grad: Annotated[
        float | None,
        Setting(
            "Largest norm of the gradient; no limit if not given.", panel=TRAINING, gt=0, limit=1e9
        ),
    ] = None
    schedule: Annotated[
        Literal["cosine", "gdpl"],
        Setting(
            "Learning rates: a linear warm-up from 0 and a cosine to 0, step by step, or those of "
            "the paper's code, epoch by epoch.",
            panel=TRAINING,
        ),
    ] = "cosine"
    warmup_epochs: Annotated[
        float, Setting("Epochs of warm-up.", panel=TRAINING, ge=0, limit=1e7)
    ] = 1.0
    drop_last: Annotated[
        bool, Setting("Leave a smaller last batch of an epoch out.", panel=TRAINING)
    ] = False
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
    augment: Annotated[Literal["none", "flips", "dihedral", "crops", "imagenet"], AUGMENT] = "crops"
    grad_checkpointing: Annotated[
        bool,
        Setting(
            "Keep only the layers' inputs for the backward pass, and compute the rest again: less "
            "memory, slower steps, the same result.",
            panel=TRAINING,
        ),
    ] = False
    val_fraction: Annotated[
        float,
        Setting(
            "Share of each class's training images to evaluate on, where DATA has neither a test "
            "nor a val split.",
            panel=IMAGES,
            ge=0.001,
            lt=1,
        ),
    ] = 0.2
    test_fraction: Annotated[
        float,
        Setting(
            "Share of each class's images to test on, where DATA has no splits at all; the "
            "validation images then only stay out of training.",
            panel=IMAGES,
            ge=0,
            lt=1,
        ),
    ] = 0.0
    intensity_range: IntensityRange = "dtype"

    def check_together(self) -> None:
        """Refuse intensity ranges that are none, and splits without training images."""
        check_intensity_range(self.intensity_range)
        if self.test_fraction + self.val_fraction >= 1:
            raise InputError(
                f"test_fraction is {self.test_fraction} and val_fraction {self.val_fraction}; "
                "expected less than 1 together, so that images to train on are left"
            )

    @classmethod
    def paper(cls, train_classes: Literal["base", "all"] = "base", **changes: Any) -> Self:
        """Return the settings of the paper's code.

        Mixed precision stays bf16 where there is a GPU: the paper's code trains in fp16 without
        scaling the loss.

        Args:
            train_classes: ``"base"`` for transfer to novel classes, ``"all"`` for transfer to
                other data sets, which has settings of its own.
            **changes: other values of some settings.

        Source: ``config/trainers/MaPLe`` of caoql98/GDPL, with the defaults of dassl.
        """
        values: dict[str, Any] = {
            "train_classes": train_classes,
            "epochs": 15 if train_classes == "base" else 25,
            "lr": 3.5e-3 if train_classes == "base" else 2.6e-3,
            "batch_size": 4,
            "schedule": "gdpl",
            "warmup_epochs": 1.0,
            "drop_last": True,
            "augment": "imagenet",
            "val_fraction": 0.2,
            "test_fraction": 0.3,
        }
        return cls(**(values | changes))


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise InputError(
            f"seeds is {text!r}; expected numbers with commas between, 1,2,3"
        ) from None


@dataclass(frozen=True)
class GDPLRunSettings(Settings):
    """What GDPL trains and evaluates on, beside the data set."""

    seeds: Annotated[
        tuple[int, ...],
        Setting(
            "Train once per seed, and average the results: 1,2,3.",
            panel=RUN,
            metavar="N,N,…",
            kind=str,
            parse=_seeds,
            expected="different numbers, 0 or more",
        ),
    ] = (1,)
    deviation: Annotated[
        Literal["sample", "population"],
        Setting(
            "Which standard deviation stands after the mean of several seeds: over n - 1 (sample), "
            "or over n (population), as in the paper's code.",
            panel=RUN,
        ),
    ] = "sample"
    eval_data: Annotated[
        tuple[Path, ...],
        Setting("Evaluate on this data set, too; may be repeated.", panel=IMAGES),
    ] = ()
    names_file: Annotated[
        Path | None,
        Setting(
            "JSON file from folder names to class names in the texts; the folders' names if not "
            "given.",
            panel=PROMPTS,
            option="class_names",
        ),
    ] = None
    domain_features: Annotated[
        Path | None,
        Setting(
            "Instead of a domain encoder: a safetensors file with one vector per image, by its "
            "path.",
            panel=DOMAIN,
        ),
    ] = None

    profile: Annotated[
        bool, Setting("Print where the seconds went, and write them to profile.json.", panel=RUN)
    ] = False

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the settings of the paper's code: three seeds, and their standard deviation."""
        return cls(**({"seeds": (1, 2, 3), "deviation": "population"} | changes))
