"""The settings of GDPL: what is added to a CLIP model, its frozen parts, and the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastadapt.config import MODEL
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings
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
    """What GDPL adds to a CLIP model. The defaults are the paper's."""

    n_ctx: Annotated[
        int,
        Setting("Prompt tokens in each layer.", panel=PROMPTS, option="prompts", ge=1, limit=4_096),
    ] = 2
    depth: Annotated[
        int,
        Setting(
            "Layers of both branches that get prompts and low-rank updates.",
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
            "Scale the low-rank updates by alpha / rank.", panel=PROMPTS, option="low_rank_alpha"
        ),
    ] = 1.0
    rank_depth: Annotated[
        int, Setting("Layers of both branches that get low-rank updates.", ge=0, limit=4_096)
    ] = 9
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
            ge=1,
            limit=65_536,
        ),
    ] = None


@dataclass(frozen=True)
class GDPLTrainConfig(Settings):
    """How to train. The defaults are the paper's.

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
    lr: Annotated[float, Setting("Peak learning rate.", panel=TRAINING, gt=0, limit=1e38)] = 3.5e-3
    batch_size: Annotated[
        int, Setting("Images in a training step.", panel=TRAINING, ge=1, limit=MOST_IMAGES)
    ] = 4
    optimizer: Annotated[
        Literal["sgd", "adamw"],
        Setting("Optimizer: SGD with momentum 0.9, or AdamW.", panel=TRAINING),
    ] = "sgd"
    weight_decay: Annotated[
        float, Setting("Weight decay of all that trains.", panel=TRAINING, ge=0)
    ] = 5e-4
    clip_grad: Annotated[
        float | None,
        Setting("Largest norm of the gradient; no limit if not given.", panel=TRAINING, gt=0),
    ] = None
    warmup_epochs: Annotated[
        float,
        Setting(
            "Epochs of linear warm-up; a cosine to 0 follows, step by step.", panel=TRAINING, ge=0
        ),
    ] = 1.0
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
    grad_checkpointing: Annotated[
        bool,
        Setting(
            "Keep only the layers' inputs for the backward pass, and compute the rest again: less "
            "memory, slower steps, the same result.",
            panel=TRAINING,
        ),
    ] = False
    augment: Annotated[
        Literal["none", "flips", "dihedral", "crops"],
        Setting(
            "Random views of training images: flips, the square's symmetries (dihedral), or "
            "crops with flips.",
            panel=IMAGES,
        ),
    ] = "crops"
    val_fraction: Annotated[
        float,
        Setting(
            "Share of each class's training images to evaluate on, where DATA has neither a test "
            "nor a val split.",
            panel=IMAGES,
            ge=0,
            le=1,
            expected="more than 0, less than 1",
        ),
    ] = 0.2
    intensity_range: IntensityRange = "dtype"

    def check_together(self) -> None:
        """Refuse intensity ranges that are none."""
        check_intensity_range(self.intensity_range)


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
