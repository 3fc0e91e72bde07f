"""What a run says when Ctrl-C stops it: the command that goes on from there."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from fastadapt.interrupt import EXIT_CODE, came, working
from fastadapt.processes import place_from_environment


@contextmanager
def how_to_continue(out: Path, overwrite: bool) -> Iterator[None]:
    """Turn Ctrl-C into one line with the command that goes on, and exit code 130."""
    try:
        with working():
            yield
    except BaseException as error:
        if not (isinstance(error, KeyboardInterrupt) or came()):
            raise
        again = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        # Folds and seeds have a folder each.
        if any(out.glob("state.safetensors")) or any(out.glob("*/state.safetensors")):
            said = "the epochs before this one are kept. Continue"
            again.append("--resume")
        elif any(out.glob("*/results.json")) and not overwrite:
            said = "the runs before this one are kept. Continue"
            again.append("--resume")
        else:
            said = "no epoch was completed. Start again"
            again += ["--overwrite"] if overwrite else []
        place = place_from_environment()
        if place.rank == 0:
            command = "fastadapt" if place.size == 1 else "torchrun … -m fastadapt"
            line = f"\nfastadapt: interrupted; {said}: {command} {shlex.join(again)}"
            print(line, file=sys.stderr)
        raise typer.Exit(EXIT_CODE) from None
