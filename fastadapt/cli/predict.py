"""The commands ``fastadapt predict`` and ``fastadapt embed``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from fastadapt.cli.options import Given, command
from fastadapt.errors import counted, form
from fastadapt.export.predict.settings import EmbedSettings, PredictSettings, WorkSettings
from fastadapt.interrupt import EXIT_CODE, came, working
from fastadapt.locks import lock_beside
from fastadapt.output_place import check_output

if TYPE_CHECKING:
    from fastadapt.export.predict.job import Summary

UNREADABLE = 3  # exit code where files or folders could not be read; all others are in the results


@command(PredictSettings, WorkSettings)
def predict(given: Given) -> None:
    """Predict the classes of any number of images; exit code 3 if files cannot be read."""
    settings, work = given.build(PredictSettings), _work(given)
    from fastadapt.export.predict.job import predict_images

    _run(lambda: predict_images(settings, work), work)


@command(EmbedSettings, WorkSettings)
def embed(given: Given) -> None:
    """Compute the features of any number of images; exit code 3 if files cannot be read."""
    settings, work = given.build(EmbedSettings), _work(given)
    from fastadapt.export.predict.job import embed_images

    _run(lambda: embed_images(settings, work), work)


def _work(given: Given) -> WorkSettings:
    """Return the settings of the work, with a link followed; refuse where results cannot go."""
    from fastadapt.export.predict.formats import check_ending

    work = given.build(WorkSettings)
    check_ending(work.out)
    return replace(work, out=check_output(work.out, "file", "results"))


def _run(job: Callable[[], Summary], work: WorkSettings) -> None:
    try:
        with working(), lock_beside(work.out):
            summary = job()
    except BaseException as error:
        if not (isinstance(error, KeyboardInterrupt) or came()):
            raise
        again = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        print(
            "\nfastadapt: interrupted; finished parts are kept. Continue: "
            f"fastadapt {shlex.join([*again, '--resume'])}",
            file=sys.stderr,
        )
        raise typer.Exit(EXIT_CODE) from None
    if not work.quiet:
        _print(summary)
    if summary.unreadable or summary.unreadable_folders:
        raise typer.Exit(UNREADABLE)


def _print(summary: Summary) -> None:
    for note in summary.notes:
        print(note, file=sys.stderr)
    if not summary.images:
        return
    if summary.unreadable:
        print(
            f"{summary.unreadable} of {counted(summary.images, 'file')} cannot be read: "
            f"{summary.unreadable_file}",
            file=sys.stderr,
        )
    speed = ""
    if summary.computed and summary.images > summary.unreadable and summary.seconds > 0:
        speed = f", {summary.computed / summary.seconds:.0f} images/s"
    print(f"{counted(summary.images - summary.unreadable, 'image')}{speed}: {summary.out}")
    if summary.metrics is not None:
        scores = summary.metrics
        if scores.get("undecided"):
            count = scores["undecided"]
            print(f"{counted(count, 'labelled image')} {form(count, 'is', 'are')} left undecided")
        if not scores["images"]:
            return
        print(
            f"accuracy {scores['accuracy']:.2%}, balanced accuracy "
            f"{scores['balanced_accuracy']:.2%}, macro-F1 {scores['macro_f1']:.4f} "
            f"({counted(scores['images'], 'labelled image')})"
        )
