"""Make a command's options from the declarations of its settings.

``@command(TrainConfig, AdaptConfig)`` turns a function of :class:`Given` into what typer calls: a
function with one parameter per option, whose name, type, default, help and panel stand in the
settings' fields (:class:`fastadapt.settings.Setting`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fastadapt.errors import InputError
from fastadapt.interrupt import EXIT_CODE
from fastadapt.settings import Field, Settings, declared

S = TypeVar("S", bound=Settings)
# Messages of the Python API name parameters so: `overwrite=True`, `weights=...`, `views`.
_PARAMETER = re.compile(r"`(\w+)(?:=([^`]*))?`")


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        group: the settings that declare it.
        field: its declaration.
        default: its default on the command line, which may differ from the field's.
    """

    group: type[Settings]
    field: Field
    default: Any

    @property
    def name(self) -> str:
        """The parameter's name on the command line, with underscores."""
        return self.field.setting.option or self.field.name

    @property
    def flag(self) -> str:
        """The option as a user writes it; an argument as the help names it."""
        if self.field.setting.argument:
            return self.field.setting.metavar or self.name.upper()
        return f"--{self.name.replace('_', '-')}"

    @property
    def value_name(self) -> str:
        """What stands for the option's value in messages."""
        setting = self.field.setting
        return setting.metavar or ("FILE" if Path in (setting.kind, self.field.kind) else "VALUE")

    @property
    def help(self) -> str:
        """The help text with the range."""
        setting = self.field.setting
        if not setting.range or setting.expected is not None:
            return setting.help
        return f"{setting.help.removesuffix('.')} ({setting.range})."

    @property
    def kind(self) -> Any:
        """The type that typer reads."""
        kind = self.field.setting.kind or self.field.kind
        if typing.get_origin(kind) is tuple:
            kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
        return kind | None if self.default is None else kind

    def parameter(self) -> inspect.Parameter:
        """Return the option as a parameter that typer reads."""
        setting = self.field.setting
        details: dict[str, Any] = {"help": self.help, "metavar": setting.metavar}
        if setting.argument:
            info = typer.Argument(**details)
        else:
            details |= {"rich_help_panel": setting.panel, "hidden": setting.hidden}
            # A switch that is off has no second flag that says so.
            single = self.field.kind is bool and self.default is False
            flags = (self.flag,) if single or self.field.kind is not bool else ()
            info = typer.Option(*flags, **details)
        default = self.default
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[self.kind, info],
            default=default,
        )

    def parsed(self, value: Any) -> Any:
        """Return what typer read as the field's value."""
        parse = self.field.setting.parse
        if parse is not None and value is not None:
            return parse(value)
        return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Given:
    """What the command line gave.

    Attributes:
        options: the command's options.
        values: their values, by option name.
        names: the options that were really given, the others have their defaults.
    """

    options: tuple[Option, ...]
    values: dict[str, Any]
    names: frozenset[str]

    def build(self, group: type[S], base: S | None = None, **more: Any) -> S:
        """Return a group of settings as the command line gave them.

        Args:
            group: the settings.
            base: has the values of options that were not given; their defaults if ``None``.
            **more: fields that are no options, or not as they were given.
        """
        fields = self.fields(group)
        if base is not None:
            given = {option.field.name for option in self.options if option.name in self.names}
            rest = {field.name: getattr(base, field.name) for field in declared(group)}
            fields = rest | {name: value for name, value in fields.items() if name in given}
        return group(**(fields | more))

    def fields(self, group: type[Settings]) -> dict[str, Any]:
        """Return the values of a group's options, by field."""
        mine = [option for option in self.options if option.group is group]
        return {option.field.name: option.parsed(self.values[option.name]) for option in mine}

    def flag(self, name: str) -> str:
        """Return an option as a user writes it."""
        return next(option.flag for option in self.options if option.name == name)


def options_of(groups: tuple[type[Settings], ...], defaults: dict[str, Any]) -> tuple[Option, ...]:
    """Return the options that settings declare.

    Args:
        groups: the settings.
        defaults: of options whose default on the command line is not the field's, by name.
    """
    found = []
    for group in groups:
        for field in declared(group):
            if field.setting.panel is None:
                continue
            default = field.default
            if field.setting.parse is not None and isinstance(default, tuple):
                default = ",".join(map(str, default))
            elif field.setting.kind is str and default not in (None, dataclasses.MISSING):
                default = str(default)
            elif isinstance(default, tuple):
                default = list(default)
            option = Option(group, field, default)
            if option.name in defaults:
                option = dataclasses.replace(option, default=defaults[option.name])
            found.append(option)
    return tuple(found)


def command(
    *groups: type[Settings], **defaults: Any
) -> Callable[[Callable[[Given], None]], Callable[..., None]]:
    """Give a function the options that settings declare.

    Args:
        *groups: the settings, in the order in which ``--help`` shows them.
        **defaults: of options whose default is not the field's.
    """
    options = options_of(groups, defaults)

    def decorate(function: Callable[[Given], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(context: typer.Context, **values: Any) -> None:
            sources = {name: str(context.get_parameter_source(name)) for name in values}
            names = {name for name, source in sources.items() if "DEFAULT" not in source}
            given = Given(options, values, frozenset(names))
            try:
                function(given)
            except InputError as error:
                error.args = (with_flags(str(error), options, values),)
                raise
            except KeyboardInterrupt:
                print("fastadapt: interrupted", file=sys.stderr)
                raise typer.Exit(EXIT_CODE) from None

        first = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        parameters = [first, *(option.parameter() for option in options)]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def with_flags(
    message: str, options: tuple[Option, ...], values: dict[str, Any] | None = None
) -> str:
    """Return a message of the Python API with the options that stand for its parameters.

    Args:
        message: of an error.
        options: the command's.
        values: theirs as given, by name; a folder that is called "data" is no option.
    """
    flags = {option.field.name: option for option in options}
    values = values or {}

    def flag(match: re.Match[str]) -> str:
        option, value = flags.get(match[1]), match[2]
        if option is None:
            return match[0]
        if value is None or value == "True" or (option.field.setting.argument and value == "..."):
            return option.flag
        if value == "False":
            return option.flag.replace("--", "--no-", 1)
        value = option.value_name if value == "..." else value.strip("'\"")
        return f"{option.flag} {value}"

    message = _PARAMETER.sub(flag, message)
    name, said, rest = message.partition(" is ")
    if not said or name not in flags:
        return message
    own = values.get(flags[name].name)
    if name in _words_of(values.values()) and not rest.startswith((str(own), repr(own))):
        return message
    return f"{flags[name].flag} is {rest}"


def _words_of(values: Iterable[Any]) -> set[str]:
    """Return values, and those in lists, as they were typed."""
    return {str(v) for value in values for v in (value if isinstance(value, list) else [value])}
