"""Match module names by regular expressions from files, of which none may run for ever.

Python's matcher backtracks: a nested quantifier takes exponential time. Patterns are therefore
refused whose number of steps cannot be bounded by

    (1) steps ≈ names · sum over patterns of  4 · a · 2^o · L^u / u!

for names of at most L characters, u unbounded quantifiers (``*``, ``+``, ``{m,n}``, and one for
the prefix that :func:`match_end` adds), o optional parts (``?``) and a ways through the
alternatives (``|``) of a pattern.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from fastadapt.errors import InputError

LONGEST_PATTERN = 500
MOST_STEPS = 10**8


@dataclass
class _Group:
    """What an open group of a pattern contains so far."""

    alternatives: int = 1
    repeats: bool = False


def match_end(pattern: str, name: str) -> bool:
    """Tell whether a pattern matches the end of a module's name, as PEFT's patterns do."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def check_patterns(patterns: Collection[str], names: Collection[str] = ()) -> None:
    """Check that matching all patterns with all names takes bounded time.

    Args:
        patterns: as for :func:`match_end`.
        names: that will be matched; a few hundred usual ones if empty.

    Raises:
        InputError: a pattern is no regular expression, too long, or has a construct whose time
            cannot be bounded; or all together take too long.
    """
    longest = max((len(name) for name in names), default=60)
    steps = sum(_steps(pattern, longest) for pattern in patterns) * (len(names) or 200)
    if steps > MOST_STEPS:
        worst = max(patterns, key=lambda pattern: _steps(pattern, longest))
        raise InputError(
            f"matching the patterns may take {steps:.1g} steps, most of them for {worst[:80]!r}: "
            "give fewer or simpler ones (the end of a module's name)"
        )


@functools.lru_cache(maxsize=10_000)
def _steps(pattern: str, length: int) -> float:
    """Bound the matcher's steps for one name; see the module's equation."""
    _check_syntax(pattern)
    alternatives, optional, unbounded = 1, 0, 1  # the prefix before the pattern is unbounded
    groups, at = [_Group()], 0
    closed: _Group | None = None
    for token in re.finditer(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{[\d,]+\}|.", pattern, re.S):
        text = token[0]
        if text == "(":
            groups.append(_Group())
        elif text == ")":
            closed = groups.pop()
            alternatives *= closed.alternatives
            groups[-1].repeats |= closed.repeats or closed.alternatives > 1
        elif text == "|":
            groups[-1].alternatives += 1
        elif text == "?" and pattern[at : at + 1] in "*+?}" and at == token.start() - 1:
            pass  # a lazy or possessive quantifier's second character
        elif text in "*+?" or (text[0] == "{" and len(text) > 2):
            group = closed if pattern[token.start() - 1] == ")" else None
            if group and text != "?" and (group.repeats or group.alternatives > 1):
                raise InputError(
                    f"the pattern {pattern[:80]!r} repeats a group that has repetitions or "
                    "alternatives itself, which can take for ever: write it without"
                )
            groups[-1].repeats = True
            optional, unbounded = (
                (optional + 1, unbounded) if text == "?" else (optional, unbounded + 1)
            )
        at = token.start()
    alternatives *= groups[0].alternatives
    exponent = math.log(4 * alternatives) + optional * math.log(2)
    exponent += unbounded * math.log(max(length, 2)) - math.lgamma(unbounded + 1)
    return math.exp(min(exponent, 700))


def _check_syntax(pattern: str) -> None:
    if not isinstance(pattern, str):
        raise InputError(f"{pattern!r} is no regular expression; expected a text")
    if len(pattern) > LONGEST_PATTERN:
        raise InputError(
            f"the pattern {pattern[:40]!r}… has {len(pattern)} characters; expected at most "
            f"{LONGEST_PATTERN}"
        )
    if re.search(r"\(\?(?!:)|\\[1-9]", pattern):
        raise InputError(
            f"the pattern {pattern[:80]!r} has a back reference or a special group; expected the "
            "end of a module's name, a plain regular expression"
        )
    try:
        re.compile(pattern)
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{pattern[:80]!r} is no regular expression ({error}); expected the end of a module's "
            "name"
        ) from None
