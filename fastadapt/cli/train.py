"""The command ``fastadapt train``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import typer.core

from fastadapt.cli.options import Given, command
from fastadapt.cli.resume import how_to_continue
from fastadapt.config import MODEL, AdaptConfig, LoRAConfig
from fastadapt.errors import InputError
from fastadapt.processes import check_one_process, place_from_environment
from fastadapt.settings import Setting, Settings
from fastadapt.train.config import (
    BackboneSource,
    ImageSettings,
    RecipeChoice,
    RunSettings,
    SavingSettings,
    TrainConfig,
)
from fastadapt.train.fold_settings import FoldSettings, dataset_of

GDPL_MOVED = (
    "GDPL has a command of its own: fastadapt gdpl DATA --clip NAME --domain-encoder NAME --out RUN"
)


@dataclass(frozen=True)
class Method(Settings):
    """What earlier versions chose between adapters and GDPL with."""

    method: Annotated[
        Literal["adapter"],
        Setting("Train an adapter, the only method of this command.", panel=MODEL, hidden=True),
    ] = "adapter"


class TrainCommand(typer.core.TyperCommand):
    """``train``, which names the new command where options of the old one are given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse ``--method gdpl`` before options of GDPL are called unknown."""
        for place, word in enumerate(args):
            if word == "--method=gdpl" or args[place : place + 2] == ["--method", "gdpl"]:
                raise InputError(GDPL_MOVED)
        return super().parse_args(ctx, args)


class Recipe(NamedTuple):
    """The settings that options which were not given come from."""

    training: TrainConfig
    adapter: AdaptConfig
    images: ImageSettings


def recipe_of(given: Given) -> Recipe:
    """Return the settings of ``--recipe``; of the paper's three modes the options choose one."""
    if given.values["recipe"] == "default":
        return Recipe(TrainConfig(), AdaptConfig(), ImageSettings())
    mode: Literal["cla", "linear", "full"] = "cla"
    if given.values["full"]:
        mode = "full"
    elif given.values["adapter"] == "none":
        mode = "linear"
    adapter = AdaptConfig.paper(mode)
    if "adapter" in given.names and given.values["adapter"] == "cladapter":
        adapter = AdaptConfig()  # an adapter where upstream has none
    return Recipe(TrainConfig.paper(mode), adapter, ImageSettings.paper())


@command(
    RunSettings,
    BackboneSource,
    AdaptConfig,
    LoRAConfig,
    RecipeChoice,
    TrainConfig,
    FoldSettings,
    ImageSettings,
    SavingSettings,
    Method,
    lora_rank=0,
)
def train(given: Given) -> None:
    """Train an adapter for a frozen backbone on labelled images; Ctrl-C, then --resume, is safe."""
    run, source = given.build(RunSettings), given.build(BackboneSource)
    if source.backbone is None:
        raise InputError("train needs --backbone NAME, timm's name of a model")
    size = given.values["image_size"]
    base = recipe_of(given)
    config = given.build(TrainConfig, base.training)
    images, saving = given.build(ImageSettings, base.images), given.build(SavingSettings)
    adapt_config = given.build(
        AdaptConfig,
        base.adapter,
        lora=given.build(LoRAConfig) if given.values["lora_rank"] else None,
        input_size=None if size is None else (3, size, size),
    )

    folds = given.build(FoldSettings)
    if folds.several:
        check_one_process("runs with --folds or --seeds")
    if folds.several and saving.profile:
        raise InputError("--profile is of one run: leave it out with --folds and --seeds")

    # Finding and decoding images need no PyTorch: processes begin before it is imported.
    from fastadapt.data.decode_pool import default_workers
    from fastadapt.data.scan import Scan

    place = place_from_environment()
    with (
        how_to_continue(run.out, run.overwrite),
        Scan(
            dataset_of(run.data, config, folds),
            default_workers() if run.workers is None else run.workers,
            config.intensity_range,
            place,
        ) as scan,
    ):
        options: dict[str, Any] = {
            "preprocess": images.preprocess(),
            "pretrained": source.pretrained,
            "weights": source.weights,
            "device": run.device,
            "workers": run.workers,
            "skip_unreadable": run.skip_unreadable,
            "resume": run.resume,
            "overwrite": run.overwrite,
            "quiet": run.quiet,
            "save_every": saving.save_every,
            "scan": scan,
        }
        what = (run.data, run.out, source.backbone, config, adapt_config)
        if folds.several:
            from fastadapt.train.cross_validation import train_folds
            from fastadapt.train.fold_results import folds_table

            table = folds_table(train_folds(*what, folds, **options))
        else:
            from fastadapt.train.results import summary_table
            from fastadapt.train.run import train as run_training

            table = summary_table(run_training(*what, **options, profile=saving.profile))
    if not run.quiet and place.rank == 0:
        from rich.console import Console

        Console(markup=False).print(table)
