"""The command ``fastadapt info``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastadapt.cli.options import Given, command
from fastadapt.settings import Setting, Settings


@dataclass(frozen=True)
class InfoSettings(Settings):
    """How the command prints."""

    json: Annotated[bool, Setting("Print the result as JSON.", panel="Options")] = False


@command(InfoSettings)
def info(given: Given) -> None:
    """Say which versions, devices, backends and runtimes are here."""
    from fastadapt.info import environment, environment_table

    if given.build(InfoSettings).json:
        import json

        print(json.dumps(environment(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console(highlight=False, markup=False).print(environment_table(environment()))
