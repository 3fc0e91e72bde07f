"""Mutations of bytes, texts and JSON values."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 4096, 32767, 65535, 65536, 100_000)
NUMBERS += (2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WORDS = ("", " ", "\0", "\n", "\r", "\x85", "\u2028", "\ufeff", "é", "漢", "\ud800", "../", "/")
WORDS += ("a" * 300,)
WORDS += ("x" * 200_000, "%s", "{}", "[bold]", "$(x)", "nan", "None", "-1", "(a+)+$", "(" * 60, "*")


def mutate_bytes(choose: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Damage bytes in one to four ways."""
    for _ in range(choose.choice((1, 1, 1, 2, 4))):
        data = choose.choice(_BYTES)(choose, data, others)
    return data


def _span(choose: random.Random, data: bytes, most: int = 64) -> slice:
    start = choose.randrange(len(data) + 1)
    return slice(start, start + choose.choice((1, 2, 4, 8, choose.randint(0, most))))


def _flip(choose: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 3, 20)) if data else 0):
        changed[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def _overwrite(choose: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    span = _span(choose, data)
    new = choose.choice((b"\0", b"\xff", choose.randbytes(1))) * len(data[span])
    return data[: span.start] + new + data[span.start + len(new) :]


def _number(choose: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    size = choose.choice((1, 2, 4, 8))
    value = choose.choice(NUMBERS) % 256**size
    start = choose.randrange(len(data) + 1)
    new = value.to_bytes(size, choose.choice(("little", "big")))
    return data[:start] + new + data[start + size :]


def _insert(choose: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start = choose.randrange(len(data) + 1)
    return data[:start] + choose.randbytes(choose.choice((1, 2, 16, 200))) + data[start:]


def _delete(choose: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    span = _span(choose, data)
    return data[: span.start] + data[span.stop :]


def _truncate(choose: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: choose.randrange(len(data) + 1)]


def _repeat(choose: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    span = _span(choose, data)
    return data[: span.stop] + data[span] * choose.choice((1, 2, 50)) + data[span.stop :]


def _move(choose: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    span = _span(choose, data)
    rest = data[: span.start] + data[span.stop :]
    start = choose.randrange(len(rest) + 1)
    return rest[:start] + data[span] + rest[start:]


def _splice(choose: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = choose.choice(others) if others else data
    return data[: choose.randrange(len(data) + 1)] + other[choose.randrange(len(other) + 1) :]


_BYTES = (_flip, _flip, _overwrite, _number, _number, _insert, _delete, _truncate, _repeat, _move)
_BYTES += (_splice,)


def mutate_text(choose: random.Random, text: str, pieces: Sequence[str]) -> str:
    """Change a text in one to four places, with pieces that mean something in it."""
    for _ in range(choose.choice((1, 1, 2, 4))):
        start = choose.randrange(len(text) + 1)
        stop = min(len(text), start + choose.choice((0, 0, 1, 2, 10)))
        text = text[:start] + choose.choice((*pieces, *WORDS[:12], "")) + text[stop:]
    return text


def random_value(choose: random.Random) -> Any:
    """Make a JSON value that hardly fits."""
    kind = choose.randrange(8)
    if kind == 0:
        return choose.choice((None, True, False))
    if kind == 1:
        return choose.choice(NUMBERS) * choose.choice((1, -1))
    if kind == 2:
        return choose.choice((0.0, -0.0, 0.5, 1e-300, 1e308, float("nan"), float("inf"), -1e9))
    if kind == 3:
        return choose.choice(WORDS)
    if kind == 4:
        return [random_value(choose) for _ in range(choose.randint(0, 3))]
    if kind == 5:
        return {choose.choice(WORDS[:12]): random_value(choose)}
    if kind == 6:
        return [choose.choice(NUMBERS[:9])] * choose.choice((1, 3, 3000))
    deep: Any = 1
    for _ in range(choose.choice((3, 50, 100))):
        deep = [deep]
    return deep


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values inside a JSON value."""
    found = []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, part in items:
        found += [(*path, key), *places(part, (*path, key))]
    return found


def get(value: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a path."""
    for key in path:
        value = value[key]
    return value


def mutate_json(choose: random.Random, value: Any) -> Any:
    """Change one to three values of a JSON value: its type, its size, its sign, its place."""
    value = json.loads(json.dumps(value))
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        known = places(value)
        if not known:
            return random_value(choose)
        path = choose.choice(known)
        holder, key = get(value, path[:-1]), path[-1]
        if not isinstance(holder, dict | list):
            continue
        kind = choose.randrange(10)
        if kind <= 2:
            holder[key] = random_value(choose)
        elif kind <= 6:
            holder[key] = _near(choose, holder[key])
        elif kind == 7:
            del holder[key]
        elif kind == 8:
            holder[key] = json.loads(json.dumps(get(value, choose.choice(known))))
        elif isinstance(holder, dict):
            holder[choose.choice((*WORDS[:12], key + "x"))] = random_value(choose)
        else:
            holder.insert(key, json.loads(json.dumps(holder[key])))
    return value


def _near(choose: random.Random, value: Any) -> Any:
    """Change a value a little, as damage or a hurried hand does."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return choose.choice((value + 1, value - 1, value * 2, -value, float(value), str(value)))
    if isinstance(value, float):
        return choose.choice((value * 1.01, -value, value * 100, round(value, 1), str(value)))
    if isinstance(value, str):
        at = choose.randrange(len(value) + 1)
        letter = choose.choice("aZ09 ./-_")
        changes = (value[:at] + letter + value[at + 1 :], value[:at], value + letter)
        return choose.choice((*changes, value.upper(), [value]))
    if isinstance(value, list):
        if not value:
            return [0]
        mixed = choose.sample(value, len(value))
        return choose.choice((mixed, value[:-1], [*value, value[0]], value * 2, []))
    return choose.choice(({}, [], None, 1))


def as_json(choose: random.Random, value: Any) -> bytes:
    """Write a JSON value as a file, now and then as no JSON library would."""
    text = json.dumps(value)
    kind = choose.randrange(24)
    if kind == 0:
        text = text.replace("{", '{"format": 1, ', 1)  # a key twice
    elif kind == 1:
        text = text.replace(": ", ": " + "[" * 20_000, 1)
    elif kind == 2:
        text = text.replace("1", "1" * 5000, 1)
    elif kind == 3:
        return mutate_bytes(choose, text.encode())
    elif kind == 4:
        return text.encode(choose.choice(("utf-16", "utf-8-sig", "utf-32")))
    return text.encode()
