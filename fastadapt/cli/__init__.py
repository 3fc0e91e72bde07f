"""The command line. Every command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from fastadapt import interrupt, processes
from fastadapt.cli.bench import bench
from fastadapt.cli.demo import demo
from fastadapt.cli.export import export, verify
from fastadapt.cli.gdpl import gdpl
from fastadapt.cli.info import info
from fastadapt.cli.predict import embed, predict
from fastadapt.cli.search import search
from fastadapt.cli.sign import sign
from fastadapt.cli.train import TrainCommand, train
from fastadapt.environment_variables import flag
from fastadapt.errors import InputError, said_by_system

DEBUG = "FASTADAPT_DEBUG"
BACKEND, BACKENDS = "FASTADAPT_BACKEND", ("auto", "triton", "reference")

app = typer.Typer(
    name="fastadapt",
    help="Adapt frozen vision models to small scientific data sets, and ship the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(info)
app.command(cls=TrainCommand)(train)
app.command()(search)
app.command()(gdpl)
app.command()(export)
app.command()(verify)
app.command()(sign)
app.command()(predict)
app.command()(embed)
app.command()(bench)
app.command()(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastadapt import __version__

        print(f"fastadapt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command's name."""
    if debug:
        os.environ[DEBUG] = "1"
    flag(DEBUG)
    chosen = os.environ.get(BACKEND, "auto")
    if chosen not in BACKENDS and context.invoked_subcommand != "info":  # which tells of it
        raise InputError(
            f"the environment variable {BACKEND} is {chosen!r}; expected one of "
            f"{', '.join(BACKENDS)}. Set it to one of these, or unset it."
        )


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and exit code 1, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show never stops a command.
        with contextlib.suppress(io.UnsupportedOperation, ValueError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
    try:
        _refuse_empty(sys.argv)
        sys.exit(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        _fail("interrupted", code=interrupt.EXIT_CODE)
    except Exception as error:
        if interrupt.came():
            _fail("interrupted", code=interrupt.EXIT_CODE)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _refuse_usage(error)
        if isinstance(error, (InputError, *_backend_error())):
            _fail(str(error))
        if isinstance(error, OSError):
            _fail(said_by_system(error))
        full = _full_memory(error)
        if full is not None:
            _fail(f"the {full}'s memory is full: close other programs, or use smaller batches")
        _fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)")


def _refuse_empty(words: list[str]) -> None:
    """Refuse an empty argument, which as a path would be the working folder."""
    for before, word in itertools.pairwise(words):
        option, equals, value = word.partition("=")
        if not word or (equals and not value and option.startswith("--")):
            where = f"after {before!r}" if not word and before != words[0] else f"{word!r}"
            _fail(
                f"the argument {where} is empty: is a variable of the shell not set? Leave it out, "
                "or give a value",
                code=2,
            )


def _refuse_usage(error: Any) -> NoReturn:
    """Say in one line which option or argument click does not understand, and exit with code 2."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    # "Value error, 'x' is not one of …": pydantic, which typer asks, adds its first two words.
    said = error.format_message().replace("Value error, ", "").removesuffix(".")
    name = "fastadapt" if context is None else context.command_path
    _fail(f"{said}; {name} --help has all options", code=error.exit_code)


def _full_memory(error: Exception) -> str | None:
    """Say whose memory is full, if an error says that one is."""
    if type(error).__name__ == "OutOfMemoryError":
        return "GPU"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "machine"
    return None


def _backend_error() -> tuple[type[Exception], ...]:
    """Return the error of the kernels, if they were imported at all."""
    kernels = sys.modules.get("fastadapt.kernels")
    return () if kernels is None else (kernels.BackendError,)


def _debugs() -> bool:
    """Say whether tracebacks are shown; a wrong value was refused before, and shows none."""
    with contextlib.suppress(InputError):
        return flag(DEBUG)
    return False


def _fail(message: str, code: int = 1) -> NoReturn:
    if _debugs() and sys.exc_info()[0] is not None:
        raise
    if not processes.speaks():
        processes.end_silently(code)
    print(f"fastadapt: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
