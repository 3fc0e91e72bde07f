"""Signs and order of the products that Hopper's kernel accumulates.

A component c of the result is a sum over components a of the left factor:

    (1)  out[c] = sum over a of sign(a, c) · left[a] @ right[a ^ c]

where ^ is the exclusive or. Products with a negative sign come first, so that the accumulator's
sign is turned only once.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

Kind = Literal["output", "input", "weights"]

_SIGNS = ((1, 1, 1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1), (-1, 1, -1, 1))  # of x_a in y_c


class Terms(NamedTuple):
    """Which products make a component, in the numbers that the kernel takes."""

    order: int  # which a comes when: 2 bits a term, 8 bits a component
    negative: int  # how many of the terms are negative: 4 bits a component
    terms: int  # how many of them make a component


@functools.cache
def hamilton_terms(kind: Kind, zero_half: bool) -> Terms:
    """Order the terms of each component of a result, negative signs first.

    Args:
        kind: ``"output"`` (a of x), ``"input"`` (a of the gradient of y) or ``"weights"`` (a of
            x, with the component a ^ c of the gradient of y).
        zero_half: x has the components j and k alone.
    """

    def sign(a: int, c: int) -> int:
        if kind == "output":
            return _SIGNS[a][c]
        return _SIGNS[c][a] if kind == "input" else _SIGNS[a][a ^ c]

    order = negative = 0
    used = (2, 3) if zero_half and kind != "input" else (0, 1, 2, 3)
    for c in range(4):
        for place, a in enumerate(sorted(used, key=lambda a: sign(a, c))):
            order |= a << (8 * c + 2 * place)
        negative |= sum(sign(a, c) < 0 for a in used) << (4 * c)
    return Terms(order - 2**32 if order >= 2**31 else order, negative, len(used))
