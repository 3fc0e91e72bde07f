"""Read the environment variables of this package: one rule for flags, one for numbers."""

import os

from fastadapt.errors import InputError

ON, OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def flag(name: str) -> bool:
    """Return whether a variable switches something on; one that is empty or not set does not.

    Raises:
        InputError: it is neither on nor off.
    """
    value = os.environ.get(name, "")
    word = value.strip().lower()
    if word not in (*ON, *OFF):
        raise InputError(f"the environment variable {name} is {value!r}; expected 1 or 0")
    return word in ON


def count(name: str, default: int) -> int:
    """Return the whole number, 1 or more, that a variable holds, else the default.

    Raises:
        InputError: it is no such number.
    """
    value = os.environ.get(name, "").strip()
    if not value:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 19 and int(value) > 0):
        raise InputError(
            f"the environment variable {name} is {value!r}; expected a whole number, at least 1"
        )
    return int(value)
