"""Write docs/command-line.md: every command with its options, from their one declaration.

    python tools/command_docs.py [--check]

``--check`` writes nothing and fails if the file is out of date.
"""

from __future__ import annotations

import sys
import typing
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

import typer
from typer.models import ArgumentInfo, OptionInfo
from typer.utils import get_params_from_function

from fastadapt.cli import app
from fastadapt.files import write_text

TARGET = Path(__file__).parents[1] / "docs" / "command-line.md"
HEAD = """# The command line

Written by `python tools/command_docs.py` from the declaration of the options; `--help` after a \
command says the same.
"""
WORDS = {int: "whole number", float: "number", str: "text", Path: "path"}


def render() -> str:
    """Return the whole page."""
    root: Any = typer.main.get_command(app)
    commands = {name: command for name, command in root.commands.items() if not command.hidden}
    links = "\n".join(
        f"- [`fastadapt {name}`](#fastadapt-{name}): {first_sentence(command.help)}"
        for name, command in commands.items()
    )
    parts = [HEAD, links]
    if app.registered_callback and app.registered_callback.callback:
        rows = table(parameters_of(app.registered_callback.callback))
        parts.append(f"Before the command:\n\n{rows}")
    callbacks = {registered_name(info): info.callback for info in app.registered_commands}
    parts += [section(name, c.help, callbacks[name]) for name, c in commands.items()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def registered_name(info: Any) -> str:
    """Return the name that a command was registered with, or that its function gives it."""
    return info.name or info.callback.__name__.replace("_", "-")


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a help text, as one line."""
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".") + "."


def parameters_of(callback: Any) -> list[Any]:
    """Return a command's parameters, each with name, annotation, default and what typer knows."""
    return [p for p in get_params_from_function(callback).values() if isinstance(p.default, INFOS)]


INFOS = (OptionInfo, ArgumentInfo)


def section(name: str, text: str | None, callback: Any) -> str:
    """Return a command's usage and one table for each panel of its help."""
    parameters = [p for p in parameters_of(callback) if not p.default.hidden]
    arguments = [p for p in parameters if isinstance(p.default, ArgumentInfo)]
    usage = " ".join(["fastadapt", name, *map(argument_name, arguments), "[OPTIONS]"])
    parts = [f"## fastadapt {name}", " ".join((text or "").split()), f"`{usage}`"]
    if arguments:
        parts.append("\n".join(f"- `{argument_name(p)}`: {help_of(p)}" for p in arguments))
    panels: dict[str, list[Any]] = {}
    for parameter in parameters:
        if isinstance(parameter.default, OptionInfo):
            title = parameter.default.rich_help_panel or "Options"
            panels.setdefault(title, []).append(parameter)
    parts += [f"**{title}**\n\n{table(options)}" for title, options in panels.items()]
    return "\n\n".join(parts)


def kind_of(parameter: Any) -> tuple[Any, bool]:
    """Return a parameter's type without None, and whether it may be given several times."""
    kind = parameter.annotation
    if typing.get_origin(kind) in (typing.Union, UnionType):
        (kind,) = (member for member in typing.get_args(kind) if member is not NoneType)
    if typing.get_origin(kind) in (list, tuple):
        return typing.get_args(kind)[0], True
    return kind, False


def argument_name(parameter: Any) -> str:
    """Return what the usage line calls an argument."""
    name = (parameter.default.metavar or parameter.name.upper()).strip("[].")
    name += "..." if kind_of(parameter)[1] else ""
    return name if parameter.default.default is ... else f"[{name}]"


def names_of(parameter: Any) -> list[str]:
    """Return the spellings of an option."""
    if parameter.default.param_decls:
        return [name for text in parameter.default.param_decls for name in text.split("/")]
    name = parameter.name.replace("_", "-")
    return [f"--{name}", *([f"--no-{name}"] if kind_of(parameter)[0] is bool else [])]


def table(options: list[Any]) -> str:
    """Return options as a table."""
    rows = ["| option | value | default | |", "| --- | --- | --- | --- |"]
    for option in options:
        names = ", ".join(f"`{name}`" for name in names_of(option))
        rows.append(f"| {names} | {value_of(option)} | {default_of(option)} | {help_of(option)} |")
    return "\n".join(rows)


def value_of(option: Any) -> str:
    """Return what an option takes, in a word; nothing for a flag."""
    kind, several = kind_of(option)
    if kind is bool:
        return ""
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    word = option.default.metavar or WORDS.get(kind, getattr(kind, "__name__", str(kind)))
    return escaped(word) + (", repeatable" if several else "")


def default_of(option: Any) -> str:
    """Return the default as the command line takes it."""
    default = option.default.default
    if default is ...:
        return "required"
    if isinstance(option.default.show_default, str):
        return escaped(option.default.show_default)
    if default is True:
        return f"`{names_of(option)[0]}`"
    if default is None or default is False or default in ("", [], ()):
        return ""
    return f"`{getattr(default, 'value', default)}`"


def help_of(parameter: Any) -> str:
    """Return the help text as a table's cell."""
    return escaped(" ".join((parameter.default.help or "").split()))


def escaped(text: str) -> str:
    """Keep bars from ending a table's cell, and names in angle brackets from being tags."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Write the page, or compare it."""
    text = render()
    if "--check" in sys.argv[1:]:
        return int(not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text)
    write_text(TARGET, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
