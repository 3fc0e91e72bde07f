"""Declare every setting once: its type, default, range and help stand in one dataclass field.

A group of settings is a frozen dataclass::

    @dataclass(frozen=True)
    class TrainConfig(Settings):
        epochs: Annotated[int, Setting("Epochs of stage 1.", panel="Training", ge=1)] = 30

All else is made from that: pydantic validates the values, given in Python or read from a file
(:meth:`Settings.from_dict`), the command line's options are generated
(:mod:`fastadapt.cli.options`), and the help texts become the docstring's "Attributes" section.

Modules that declare settings import nothing heavy, so that ``fastadapt --help`` is quick; pydantic
is imported with the first values.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import reprlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self

from fastadapt.errors import InputError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_TOO_LITTLE = ("greater_than", "greater_than_equal")
_PREFIX = "value_of_"
_TOO_MUCH = ("less_than", "less_than_equal")


@dataclass(frozen=True)
class Setting:
    """What a field's annotation says of its setting.

    Attributes:
        help: a whole phrase, for the command line and the docstring.
        panel: the panel of ``--help`` that shows the option; None for a setting that is no option.
        option: the option's name, if it is not the field's.
        metavar: what ``--help`` calls the value.
        ge, gt, le, lt: the range.
        limit: the largest value that is accepted at all. It is far beyond use, so that a damaged
            file cannot ask for all memory, and texts do not mention it.
        expected: what fits, in words, where type and range do not say it.
        shown_default: the default in words, for None.
        kind: the type that the command line reads, if it is not the field's.
        parse: turns what the command line read into the field's value.
        argument: it is an argument of the command, not an option.
        hidden: the option is accepted, and not shown.
    """

    help: str
    panel: str | None = None
    option: str | None = None
    metavar: str | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    limit: float | None = None
    expected: str | None = None
    shown_default: str | None = None
    kind: Any = None
    parse: Callable[[Any], Any] | None = None
    argument: bool = False
    hidden: bool = False

    @property
    def range(self) -> str:
        """Say the range in words: "at least 1", "0 or more, less than 1"."""
        if self.ge is not None and self.le is not None:
            return f"{_number(self.ge)} to {_number(self.le)}"
        words = []
        if self.ge is not None:
            words.append("0 or more" if self.ge == 0 else f"at least {_number(self.ge)}")
        if self.gt is not None:
            words.append(f"more than {_number(self.gt)}")
        if self.le is not None:
            words.append(f"at most {_number(self.le)}")
        if self.lt is not None:
            words.append(f"less than {_number(self.lt)}")
        return ", ".join(words)


@dataclass(frozen=True)
class Field:
    """A declared field.

    Attributes:
        name: its name.
        annotation: its whole type, for pydantic.
        kind: its type without None; a union of what else it may be.
        optional: whether it may be None.
        default: its default; ``dataclasses.MISSING`` if a value must be given.
        setting: what the annotation says.
    """

    name: str
    annotation: Any
    kind: Any
    optional: bool
    default: Any
    setting: Setting

    @property
    def expected(self) -> str:
        """Say in words which values fit."""
        if self.setting.expected is not None:
            return self.setting.expected
        if typing.get_origin(self.kind) is Literal:
            choices = [str(choice) for choice in typing.get_args(self.kind)]
            if len(choices) == 2:
                return " or ".join(choices)
            return f"one of {', '.join(choices)}"
        word = _WORDS.get(self.kind, getattr(self.kind, "__name__", str(self.kind)))
        return ", ".join(part for part in (word, self.setting.range) if part)


class Settings:
    """Base of the groups of settings: frozen dataclasses with validated values."""

    def __init_subclass__(cls) -> None:
        """Write the fields' help into the docstring."""
        # With those of base classes, as a reader of the class wants them.
        own = [name for base in reversed(cls.__mro__) for name in inspect.get_annotations(base)]
        own = list(dict.fromkeys(own))
        hints = typing.get_type_hints(cls, include_extras=True)
        said = [f"    {name}: {_setting(hints[name]).help}" for name in own]
        if said:
            cls.__doc__ = "\n".join([inspect.getdoc(cls) or "", "", "Attributes:", *said])

    def __post_init__(self) -> None:
        """Validate the values.

        Raises:
            InputError: a value has another type or is out of its range, or values exclude each
                other (:meth:`check_together`); one line with the setting, the value and what is
                expected.
        """
        fields = declared(type(self))
        values = {field.name: getattr(self, field.name) for field in fields}
        # Defaults fit, a test holds that; a program that changes none needs no pydantic.
        if any(values[field.name] is not field.default for field in fields):
            for name, value in validated(type(self), values).items():
                object.__setattr__(self, name, value)
        self.check_together()

    def check_together(self) -> None:
        """Refuse settings that exclude each other, with an InputError."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary, for JSON."""
        return dataclasses.asdict(typing.cast(Any, self))

    @classmethod
    def from_dict(cls, values: Any, where: str = "") -> Self:
        """Make the settings from what a file holds.

        Args:
            values: of the fields, by name; what is missing has its default.
            where: what holds them, for messages: "the adapter's configuration".

        Raises:
            InputError: it is no dictionary; a key is unknown or missing; a value has another type
                or is out of its range.
        """
        where = where or f"the {cls.__name__}"
        if not isinstance(values, Mapping):
            raise InputError(f"{where} is {_shown(values)}; expected a JSON object")
        fields = {field.name: field for field in declared(cls)}
        for key in values:
            if key not in fields:
                raise InputError(
                    f"{where} has {key!r}, which this version of fastadapt does not know: "
                    "update fastadapt"
                )
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise InputError(f"{where} lacks {name!r}; expected {field.expected}")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def declared(cls: type) -> tuple[Field, ...]:
    """Return the fields of a group of settings, in order."""
    return _declared(cls)


@functools.cache
def _declared(cls: type) -> tuple[Field, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        annotation = kind = hints[field.name]
        optional = False
        if typing.get_origin(kind) is Annotated:
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) in (typing.Union, UnionType):
            kinds = [member for member in typing.get_args(kind) if member is not NoneType]
            optional = len(kinds) < len(typing.get_args(kind))
            kind = typing.Union[tuple(kinds)]  # noqa: UP007, of one is that one
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        setting = _setting(annotation)
        found.append(Field(field.name, annotation, kind, optional, default, setting))
    return tuple(found)


def validated(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of all fields of a group, as their types are.

    Raises:
        InputError: a value has another type or is out of its range.
    """
    import pydantic

    values = {name: _plain(value) for name, value in values.items()}
    try:
        valid = _validator(cls).model_validate(values)
    except pydantic.ValidationError as error:
        raise _input_error(cls, error, values) from None
    return {name: getattr(valid, f"{_PREFIX}{name}") for name in values}


def _setting(annotation: Any) -> Setting:
    """Return what an annotation says; a setting that says nothing has no help."""
    metadata = getattr(annotation, "__metadata__", ())
    return next((item for item in metadata if isinstance(item, Setting)), Setting(""))


@functools.cache
def _validator(cls: type) -> Any:
    """Return a pydantic model of the fields."""
    import pydantic

    config = pydantic.ConfigDict(
        strict=True,  # "3" is no number, True is no 1
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )
    fields: dict[str, Any] = {}
    for field in declared(cls):
        setting = field.setting
        bounds = {name: getattr(setting, name) for name in ("ge", "gt", "le", "lt")}
        bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        if setting.limit is not None:
            bounds["le"] = setting.limit
        # A model has methods, json() for one, that a field's name must not hide.
        fields[f"{_PREFIX}{field.name}"] = (
            field.annotation,
            pydantic.Field(alias=field.name, **bounds),
        )
    return pydantic.create_model(cls.__name__, __config__=config, **fields)


def _plain(value: Any) -> Any:
    """Return NumPy's integers as Python's, and lists, which JSON has, as tuples."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if type(value) in (list, tuple):
        return tuple(map(_plain, value))
    return value


def _input_error(cls: type, error: Any, values: dict[str, Any]) -> InputError:
    """Return the first of pydantic's errors as one line."""
    first = error.errors(include_url=False)[0]
    name, kind = first["loc"][0], first["type"]
    field = next(field for field in declared(cls) if field.name == name)
    expected, number = field.expected, values[name]
    in_words = field.setting.expected is not None
    if (
        field.setting.range
        and not in_words
        and isinstance(number, int | float)
        and not isinstance(number, bool)
    ):
        if kind in _TOO_LITTLE or not math.isfinite(number):
            endless = field.setting.le is None and field.setting.lt is None and number == math.inf
            expected = f"{'a finite number, ' if endless else ''}{field.setting.range}"
        elif kind in _TOO_MUCH:
            beyond_use = field.setting.le is None and field.setting.lt is None
            expected = field.setting.range
            if beyond_use and field.setting.limit is not None:
                expected = f"at most {_number(field.setting.limit)}"
    return InputError(f"{name} is {_shown(number)}; expected {expected}")


def _number(value: float) -> str:
    """Return a bound as a message shows it: 1,000,000, not 1e+06."""
    return f"{value:,.12g}"


def _shown(value: Any) -> str:
    """Return a value as a message shows it."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxtuple = short.maxlist = short.maxdict = 6
    return short.repr(value)
