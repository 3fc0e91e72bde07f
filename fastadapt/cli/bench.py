"""The command ``fastadapt bench``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastadapt.cli.options import Given, command
from fastadapt.errors import InputError
from fastadapt.interrupt import working
from fastadapt.output_place import check_output
from fastadapt.settings import Setting, Settings

PANEL = "Options"


@dataclass(frozen=True)
class BenchSettings(Settings):
    """What is measured, and where the results go."""

    names: Annotated[
        tuple[str, ...],
        Setting(
            "Benchmarks to run; all if none is named.", PANEL, metavar="[NAME]...", argument=True
        ),
    ] = ()
    quick: Annotated[bool, Setting("Measure fewer shapes, in under three minutes.", PANEL)] = False
    json: Annotated[
        Path | None,
        Setting("Write the results to this file or folder, and as Markdown beside it.", PANEL),
    ] = None
    compare: Annotated[
        str | None,
        Setting("Say what got faster or slower since then.", PANEL, metavar="FILE|COMMIT"),
    ] = None
    threshold: Annotated[
        float,
        Setting(
            "Exit with code 1 if slower than --compare by more percent than this.", PANEL, ge=0
        ),
    ] = 5.0
    plot: Annotated[bool, Setting("Draw pictures beside --json.", PANEL)] = False
    tune: Annotated[bool, Setting("Measure launch configurations, and keep the best.", PANEL)] = (
        False
    )
    size: Annotated[
        tuple[str, ...],
        Setting(
            "Tune for this batch, tokens and channels; may be repeated.", PANEL, metavar="BxNxC"
        ),
    ] = ()


@command(BenchSettings)
def bench(given: Given) -> None:
    """Time operations, training and deployment beside PyTorch's own and the papers' code."""
    settings = given.build(BenchSettings)
    if settings.size and not settings.tune:
        raise InputError("--size goes with --tune: benchmarks have sizes of their own")
    if settings.tune:
        from fastadapt.bench.tune import parse_size
        from fastadapt.bench.tune import run as run_tuning

        with working():
            run_tuning([parse_size(text) for text in settings.size])
        return
    if settings.json is not None:
        kind = "file" if settings.json.suffix == ".json" else "folder"
        check_output(settings.json, kind, "results", "json")  # type: ignore[arg-type]
    from fastadapt.bench import run

    with working():
        code = run(
            list(settings.names),
            quick=settings.quick,
            json_out=settings.json,
            compare=settings.compare,
            threshold=settings.threshold,
            plot=settings.plot,
            command=shlex.join(["fastadapt", *sys.argv[1:]]),
        )
    raise typer.Exit(code)
