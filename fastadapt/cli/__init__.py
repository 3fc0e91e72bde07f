"""The command line. Every command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastadapt.cli.export import export, verify
from fastadapt.cli.train import train

app = typer.Typer(
    name="fastadapt",
    help="Adapt frozen vision models to small scientific data sets, and ship the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        os.environ["FASTADAPT_DEBUG"] = "1"


@app.command()
def info() -> None:
    """Say which versions, devices, backends and runtimes are here."""
    from rich.console import Console

    from fastadapt.info import environment_table

    Console().print(environment_table())


app.command()(train)
app.command()(export)
app.command()(verify)


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Benchmarks; all if none.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer shapes, in under three minutes.")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option(help="Write the results to this file or folder, and as Markdown beside it."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="FILE|COMMIT", help="Say what got faster or slower since then."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, help="Slower than --compare by more percent: exit code 1.")
    ] = 5.0,
    plot: Annotated[bool, typer.Option("--plot", help="Draw pictures beside --json.")] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Measure launch configurations, keep the best."),
    ] = False,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="BxNxC", help="Tune this batch, tokens, channels; may be repeated."),
    ] = None,
) -> None:
    """Time operations, training and deployment beside PyTorch's own and the papers' code."""
    from fastadapt.errors import InputError

    if size and not tune:
        raise InputError("--size goes with --tune: benchmarks have sizes of their own")
    if tune:
        from fastadapt.bench.tune import parse_size
        from fastadapt.bench.tune import run as run_tuning

        run_tuning([parse_size(text) for text in size or ()])
        return
    from fastadapt.bench import run

    raise typer.Exit(
        run(
            names or [],
            quick=quick,
            json_out=json,
            compare=compare,
            threshold=threshold,
            plot=plot,
            command=shlex.join(["fastadapt", *sys.argv[1:]]),
        )
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all that is made.")] = Path("demo-out"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier demo's files.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=200, help="Use about this many of the 2,624 images.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 8,
) -> None:
    """Run the main job, end to end, on real images of solar cells (some minutes)."""
    from fastadapt.demo import run

    run(out, overwrite=overwrite, limit=limit, epochs=epochs)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 1, not a traceback."""
    from fastadapt.errors import InputError
    from fastadapt.kernels import BackendError

    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except (InputError, BackendError, OSError) as error:
        _fail(str(error))
    except Exception as error:
        _fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)")


def _fail(message: str, code: int = 1) -> None:
    if os.environ.get("FASTADAPT_DEBUG") and sys.exc_info()[0] is not None:
        raise
    print(f"fastadapt: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
