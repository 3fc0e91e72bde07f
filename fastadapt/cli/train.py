"""The command ``fastadapt train``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import typer.core

from fastadapt.cli.options import Given, command, options_of
from fastadapt.cli.resume import how_to_continue
from fastadapt.config import MODEL, AdaptConfig, LoRAConfig
from fastadapt.errors import InputError
from fastadapt.output_place import check_output
from fastadapt.processes import check_one_process, place_from_environment
from fastadapt.settings import Setting, Settings
from fastadapt.train.config import (
    DEFAULT_ADAPTER,
    BackboneSource,
    ImageSettings,
    RecipeChoice,
    RunSettings,
    SavingSettings,
    TrainConfig,
)
from fastadapt.train.fold_settings import FoldSettings, dataset_of
from fastadapt.train.request import Request, is_finished
from fastadapt.train.run_settings import StartSettings

GDPL_MOVED = (
    "GDPL has a command of its own: fastadapt gdpl DATA --clip NAME --domain-encoder NAME --out RUN"
)
ALONE = (
    "cannot be given with --resume and no DATA, which goes on with the run's own settings: leave "
    "it out, or give DATA and all options again"
)
OF_ADAPTER = frozenset(("depth", "centers", "rank", "mlp_ratio", "mode", "proj_drop"))
STAGE_2 = frozenset(("epochs2", "lr2", "batch_size2"))
INIT = "is the run's that --init names: leave it out"


@dataclass(frozen=True)
class Method(Settings):
    """What earlier versions chose between adapters and GDPL with."""

    method: Annotated[
        Literal["adapter", "gdpl"],
        Setting("Train an adapter; gdpl is a command of its own.", panel=MODEL, hidden=True),
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


def default_training(given: Given) -> TrainConfig:
    """Return the default recipe of what trains: the adapter, the head alone, or everything."""
    values = given.values
    if values["full"]:
        return TrainConfig.default("full")
    # On cached features a refit is a matter of seconds, else of all the time once more.
    quick = values["stages"] == 1 and values["cache"] and not values["lora_rank"]
    what: Literal["adapter", "head"] = "head" if values["adapter"] == "none" else "adapter"
    return TrainConfig.default(what, refit=quick)


def recipe_of(given: Given) -> Recipe:
    """Return the settings of ``--recipe``; of the paper's three modes the options choose one."""
    if given.values["recipe"] == "default":
        return Recipe(default_training(given), AdaptConfig(**DEFAULT_ADAPTER), ImageSettings())
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
    StartSettings,
    Method,
    lora_rank=0,
    data=None,
    refit=True,
    **DEFAULT_ADAPTER,
)
def train(given: Given) -> None:
    """Train an adapter for a frozen backbone on labelled images; Ctrl-C, then --resume, is safe."""
    run, saving = given.build(RunSettings), given.build(SavingSettings)
    check_output(run.out, "folder", "a run")
    request = _recorded(given, run) if run.resume and run.data is None else _asked_for(given, run)
    if request is None:
        if not run.quiet:
            print(f"{run.out} is finished already: nothing to resume")
        return
    folds = request.folds or FoldSettings()
    if folds.several:
        check_one_process("runs with --folds or --seeds")
    if folds.several and saving.profile:
        raise InputError("--profile is of one run: leave it out with --folds and --seeds")

    # Finding and decoding images need no PyTorch: processes begin before it is imported.
    from fastadapt.data.decode_pool import default_workers
    from fastadapt.data.scan import Scan
    from fastadapt.gpu_start import begin_context
    from fastadapt.no_compiler import leave_compiler_out

    place = place_from_environment()
    with (
        how_to_continue(run.out, run.overwrite),
        Scan(
            dataset_of(request.data, request.config, folds),
            default_workers() if run.workers is None else run.workers,
            request.config.intensity_range,
            place,
            keep=request.config.decode == "cpu",
        ) as scan,
    ):
        begin_context(run.device)
        leave_compiler_out()
        options: dict[str, Any] = {
            "preprocess": request.preprocess,
            "pretrained": request.pretrained,
            "weights": request.weights,
            "device": run.device,
            "workers": run.workers,
            "skip_unreadable": request.skip_unreadable,
            "resume": run.resume,
            "overwrite": run.overwrite,
            "quiet": run.quiet,
            "save_every": saving.save_every,
            "scan": scan,
        }
        what: Any = (request.data, run.out, request.backbone, request.config, request.adapt_config)
        if folds.several:
            from fastadapt.train.cross_validation import train_folds
            from fastadapt.train.fold_results import folds_table

            options["folds"] = folds
            table = folds_table(train_folds(*what, **options))
        else:
            from fastadapt.train.results import summary_table
            from fastadapt.train.run import train as run_training

            options |= {"init": request.init, "profile": saving.profile}
            table = summary_table(run_training(*what, **options))
    if not run.quiet and place.rank == 0:
        from rich.console import Console

        Console(markup=False).print(table)


def _asked_for(given: Given, run: RunSettings) -> Request:
    """Return what the options ask for."""
    source, folds = given.build(BackboneSource), given.build(FoldSettings)
    base, size, init = recipe_of(given), given.values["image_size"], given.build(StartSettings).init
    images = given.build(ImageSettings, base.images)
    if source.backbone is None and init is None:
        raise InputError("train needs --backbone NAME, timm's name of a model")
    if init is not None:
        _refuse(given, _fields(AdaptConfig, LoRAConfig) | {"image_size", "pretrained"}, INIT)
        if folds.several:
            raise InputError("--init is for one run: leave it out with --folds and --seeds")
    if given.values["adapter"] == "none" or base.adapter.adapter == "none":
        _refuse(given, OF_ADAPTER, "is of an adapter, and there is none: leave it out")
    adapt_config = given.build(
        AdaptConfig,
        base.adapter,
        lora=given.build(LoRAConfig) if given.values["lora_rank"] else None,
        input_size=None if size is None else (3, size, size),
    )
    config = given.build(TrainConfig, base.training)
    if config.stages == 1:
        _refuse(given, STAGE_2, "is of stage 2, and one is trained: give --stages 2, too")
    if not given.values["lora_rank"]:
        _refuse(given, _fields(LoRAConfig) - {"lora_rank"}, "is of LoRA: give --lora-rank, too")
    return Request(
        str(run.dataset),
        source.backbone,
        config,
        adapt_config if init is None else None,
        images.preprocess(),
        source.pretrained,
        None if source.weights is None else str(source.weights),
        run.skip_unreadable,
        None if init is None else str(init),
        folds,
    )


def _recorded(given: Given, run: RunSettings) -> Request | None:
    """Return what the run in a folder was asked for; None if it is finished."""
    names = _fields(
        TrainConfig, AdaptConfig, LoRAConfig, BackboneSource, ImageSettings, StartSettings
    )
    names |= _fields(FoldSettings) - {"devices"}  # folds may go on on others
    _refuse(given, names | {"skip_unreadable"}, ALONE)
    if run.overwrite:
        raise InputError("--resume and --overwrite exclude each other: give one of them")
    if not run.out.is_dir():
        raise InputError(f"{run.out} does not exist, so there is no run to resume")
    if is_finished(run.out):
        return None
    request = Request.read(run.out)
    if request.backbone is None and request.init is None:
        raise InputError(f"{run.out} was started in Python, on a module: resume it there")
    if given.values["devices"] is not None:
        folds = replace(request.folds or FoldSettings(), devices=given.values["devices"])
        request = replace(request, folds=folds)
    return request


def _fields(*groups: type[Settings]) -> frozenset[str]:
    """Return the names of the options that groups of settings declare."""
    return frozenset(option.name for option in options_of(groups, {}))


def _refuse(given: Given, names: frozenset[str], why: str) -> None:
    for name in sorted(given.names & names):
        raise InputError(f"{given.flag(name)} {why}")
