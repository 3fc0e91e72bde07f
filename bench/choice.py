"""Choose a part of a benchmark by an environment variable."""

from __future__ import annotations

import os
import re
from typing import TypeVar

from fastadapt.errors import InputError

P = TypeVar("P")


def choose(variable: str, title: str, every: dict[str, P]) -> dict[str, P]:
    """Return those rows of a table that an environment variable names.

    Args:
        variable: holds a regular expression that is searched in "TITLE, NAME"; all rows are named
            if it is not set.
        title: of the table.
        every: what makes each row, by name.

    Raises:
        InputError: the variable holds no regular expression.
    """
    pattern = os.environ.get(variable, "")
    try:
        wanted = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise InputError(f"{variable} is {pattern!r}, no regular expression: {error}") from error
    return {name: p for name, p in every.items() if wanted.search(f"{title}, {name}")}
