"""Read the devices that a job is spread over, as every ``--devices`` and ``devices=`` gives them.

    devices = "all" | device ("," device)*        device = "cpu" | N | "cuda:" N

N is the number of a GPU, from 0, as PyTorch counts those that it sees. ``all`` is every GPU, or the
CPU where there is none. A device that is named twice has two processes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastadapt.errors import InputError

DEVICES_HELP = "all (every GPU, or the CPU where there is none), 0,1, cuda:0,cuda:1, or cpu,cpu."
METAVAR = "all|0,1|cpu"
_DEVICE = re.compile(r"cpu|(?:cuda:)?([0-9]{1,6})")


def check_devices(given: str | Sequence[str]) -> None:
    """Refuse what is no list of devices, without a look at which of them are here.

    Raises:
        InputError: as said.
    """
    words = _words(given)
    if words != ["all"] and not (words and all(map(_DEVICE.fullmatch, words))):
        shown = given if isinstance(given, str) else ",".join(words)
        raise InputError(
            f"devices is {shown!r}; expected all, or devices with commas between them: 0,1 or "
            "cuda:0,cuda:1 or cpu,cpu"
        )


def expand_devices(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the devices that are meant, in order: ``"cuda:0"``, …, ``"cpu"``.

    Args:
        given: a text of the grammar above, or its words.

    Raises:
        InputError: it is no list of devices, or a GPU is not here.
    """
    import torch  # not for --help

    check_devices(given)
    words, count = _words(given), torch.cuda.device_count()
    if words == ["all"]:
        return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)
    found = []
    for word in words:
        match = _DEVICE.fullmatch(word)
        index = None if match is None or match[1] is None else int(match[1])
        if index is not None and index >= count:
            here = f"{count} are there, from 0" if count else "PyTorch finds no GPU"
            raise InputError(
                f"devices is {','.join(words)!r}, but {here}: leave `devices` out, or name all"
            )
        found.append("cpu" if index is None else f"cuda:{index}")
    return tuple(found)


def check_one_way(device: str, devices: str | Sequence[str] | None) -> None:
    """Refuse one device and several beside each other.

    Raises:
        InputError: both are given.
    """
    if devices and device != "auto":
        raise InputError("`device` is one device and `devices` are several: give one of them")


def _words(given: str | Sequence[str]) -> list[str]:
    return [word.strip() for word in (given.split(",") if isinstance(given, str) else given)]
