"""The command ``fastadapt search``."""

from __future__ import annotations

from fastadapt.cli.options import Given, command
from fastadapt.config import AdaptConfig
from fastadapt.interrupt import working
from fastadapt.processes import check_one_process
from fastadapt.train.config import (
    DEFAULT_ADAPTER,
    BackboneSource,
    ImageSettings,
    RunSettings,
    TrainConfig,
)
from fastadapt.train.search_config import SearchConfig


@command(
    RunSettings,
    BackboneSource,
    SearchConfig,
    AdaptConfig,
    TrainConfig,
    ImageSettings,
    refit=True,
    **DEFAULT_ADAPTER,
)
def search(given: Given) -> None:
    """Search for the best recipe by folds, train with it; options that are given are held."""
    run, source = given.build(RunSettings), given.build(BackboneSource)
    how, config = given.build(SearchConfig), given.build(TrainConfig, TrainConfig.default())
    images, size = given.build(ImageSettings), given.values["image_size"]
    check_one_process("searches")
    backbones = how.named_backbones(source.backbone, source.weights)
    held = [option.field.name for option in given.options if option.name in given.names]
    # Views are held only where none are wanted: one of several is a choice.
    held = [name for name in held if name != "views"]

    from fastadapt.train.search import search as run_search

    with working():
        found = run_search(
            run.dataset,
            run.out,
            backbones,
            how,
            config,
            given.build(AdaptConfig),
            held=held,
            image_size=size,
            preprocess=images.preprocess(),
            pretrained=source.pretrained,
            device=run.device,
            workers=run.workers,
            skip_unreadable=run.skip_unreadable,
            resume=run.resume,
            overwrite=run.overwrite,
            quiet=run.quiet,
        )
    if not run.quiet:
        from rich.console import Console

        from fastadapt.train.results import summary_table

        Console(markup=False).print(summary_table(found.run))
