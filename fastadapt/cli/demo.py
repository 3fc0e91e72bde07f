"""The command ``fastadapt demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastadapt.cli.options import Given, command
from fastadapt.interrupt import working
from fastadapt.settings import Setting, Settings

PANEL = "Options"


@dataclass(frozen=True)
class DemoSettings(Settings):
    """How much of the demo runs, and where."""

    out: Annotated[Path, Setting("Folder for all that the demo makes.", panel=PANEL)] = Path(
        "demo-out"
    )
    overwrite: Annotated[bool, Setting("Replace the files of an earlier demo.", panel=PANEL)] = (
        False
    )
    limit: Annotated[
        int | None, Setting("Use about this many of the 2,624 images.", panel=PANEL, ge=200)
    ] = None
    epochs: Annotated[int, Setting("Epochs of training.", panel=PANEL, ge=1, limit=1_000_000)] = 16


@command(DemoSettings)
def demo(given: Given) -> None:
    """Run the main job, end to end, on real images of solar cells (some minutes)."""
    settings = given.build(DemoSettings)

    from fastadapt.demo import run

    with working():
        run(
            settings.out,
            overwrite=settings.overwrite,
            limit=settings.limit,
            epochs=settings.epochs,
        )
