"""Options come from declarations, and nowhere else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from fastadapt.cli import app
from fastadapt.cli.options import Given, command, options_of, with_flags
from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings

PANEL = "Sizes"


@dataclass(frozen=True)
class Example(Settings):
    """An example."""

    folder: Annotated[Path, Setting("A folder.", PANEL, metavar="FOLDER", argument=True)]
    width: Annotated[int, Setting("Width of it.", PANEL, ge=1)] = 3
    kind: Annotated[Literal["a", "b"], Setting("Kind of it.", PANEL)] = "a"
    keep: Annotated[bool, Setting("Keep it.", PANEL)] = True
    again: Annotated[bool, Setting("Do it again.", PANEL)] = False
    share: Annotated[float | None, Setting("Share of it.", PANEL, option="part")] = None
    files: Annotated[tuple[Path, ...], Setting("Files of it.", PANEL, option="file")] = ()
    counts: Annotated[
        tuple[int, ...],
        Setting(
            "Counts of it.", PANEL, kind=str, parse=lambda text: tuple(map(int, text.split(",")))
        ),
    ] = (1, 2)
    old: Annotated[bool, Setting("Has no effect any more.", PANEL, hidden=True)] = False
    inner: Annotated[int, Setting("No option.")] = 4


def run(*args, function=None):
    seen = []

    @command(Example)
    def example(given: Given) -> None:
        """Do something."""
        seen.append((given, given.build(Example)))
        if function:
            function()

    app = typer.Typer()
    app.command()(example)
    result = CliRunner().invoke(app, list(args))
    return result, seen


def test_defaults():
    _, [(given, made)] = run("here")
    assert made == Example(Path("here"))
    assert given.names == {"folder"}


def test_values():
    args = "here --width 5 --kind b --no-keep --again --part 0.5 --file a --file b --counts 3,4"
    _, [(given, made)] = run(*args.split(), "--old")
    assert made == Example(
        Path("here"), 5, "b", False, True, 0.5, (Path("a"), Path("b")), (3, 4), True
    )
    assert "part" in given.names and given.flag("part") == "--part"


def test_help():
    result, _ = run("--help")
    shown = " ".join(result.output.replace("│", " ").split())
    assert PANEL in shown and "Do something." in shown
    assert "Width of it (at least 1)." in shown and "[default: 3]" in shown
    assert "--keep" in shown and "--no-keep" in shown and "--no-again" not in shown
    assert "--old" not in shown and "--inner" not in shown


def test_what_typer_refuses_and_what_the_declaration_refuses():
    assert run("here", "--kind", "c")[0].exit_code == 2
    assert run("here", "--inner", "3")[0].exit_code == 2
    result, _ = run("here", "--width", "0")
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == "--width is 0; expected at least 1"


def test_interruption_is_one_line():
    def interrupt():
        raise KeyboardInterrupt

    result, _ = run("here", function=interrupt)
    assert result.exit_code == 130 and "fastadapt: interrupted\n" in result.output


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("give `again=True`, or `keep=False`", "give --again, or --no-keep"),
        ("set `share=0.5` or `kind='b'`", "set --part 0.5 or --kind b"),
        ("pass `folder=...` and leave `width` out", "pass FOLDER and leave --width out"),
        ("give `files=...`", "give --file VALUE"),
        ("share is 3; expected less", "--part is 3; expected less"),
        ("nothing is `elsewhere=3`", "nothing is `elsewhere=3`"),
    ],
)
def test_messages_of_python_name_options(message, says):
    assert with_flags(message, options_of((Example,), {})) == says


def test_a_value_that_has_an_options_name_is_no_option():
    options = options_of((Example,), {})
    values = {"folder": "width", "width": 3, "part": 0.5}
    for message, says in {
        "width is no folder": "width is no folder",
        "width is 3; expected less": "--width is 3; expected less",
        "share is 0.5; expected less": "--part is 0.5; expected less",
        "folder is width, which is none": "FOLDER is width, which is none",
    }.items():
        assert with_flags(message, options, values) == says


def _commands():
    return {command.callback.__name__: command for command in app.registered_commands}


@pytest.mark.parametrize("name", sorted(_commands()))
def test_every_help_text_is_a_whole_phrase(name):
    """The first word is capital, the end a full stop, and rich sees no markup in it."""
    import inspect

    callback = _commands()[name].callback
    for parameter in inspect.signature(callback).parameters.values():
        for info in getattr(parameter.annotation, "__metadata__", ()):
            assert info.help.endswith(".") and "[" not in info.help, parameter.name
            assert not info.help.startswith(("Of ", "In ", "As ")), parameter.name
            assert info.help[0].isupper() or info.help.startswith(("timm", "open_clip"))
