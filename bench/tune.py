"""Measure launch configurations of cluster attention and keep the best: ``bench --tune``.

Tuning runs on request alone, so that no training loop stalls in it (see
``fastadapt.kernels.common.tuning``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadapt.errors import InputError
from fastadapt.files import write_json
from fastadapt.kernels import cluster_attention
from fastadapt.kernels.common import tuning

from . import harness
from .suites.cluster_attention import RANK, SHAPES, make_inputs


def parse_size(text: str) -> tuple[int, int, int]:
    """Return batch, tokens and channels of a size such as "64x196x768".

    Raises:
        InputError: the text is something else.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--size {text}: expected batch x tokens x channels, e.g. 64x196x768")
    batch, tokens, width = map(int, parts)
    return batch, tokens, width


def run(sizes: Sequence[tuple[int, int, int]] = ()) -> dict[str, dict[str, int]]:
    """Tune each size (those of the benchmark, if none is given) and write the choices.

    Returns:
        The configurations that were written, by GPU, operation and size.

    Raises:
        InputError: there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise InputError("--tune measures on a CUDA GPU, and PyTorch sees none here")
    from fastadapt.kernels.cluster_attention.block_sizes import block_sizes, candidates
    from fastadapt.kernels.common.launcher import device_of

    choices = dict(tuning.read())
    for batch, tokens, width in sizes or tuple(SHAPES):
        sets = harness.input_sets(2 * batch * tokens * width)
        inputs = [make_inputs(batch, tokens, width, seed) for seed in range(sets)]
        device = device_of(torch.cuda.current_device())
        size = (batch * tokens, tokens, width, RANK)
        key = tuning.key("cluster_attention", torch.cuda.current_device(), size)
        times: dict[tuple, float] = {}
        for candidate in _candidates(size, candidates(size[0], tokens, RANK, device)):
            with tuning.forced({key: candidate}):
                block_sizes.cache_clear()
                times[tuple(candidate.items())] = _step_time(inputs)
        block_sizes.cache_clear()
        best = min(times, key=times.__getitem__)
        choices[key] = dict(best)
        print(f"{batch} × {tokens} × {width}: {_table(times)}", flush=True)
        write_json(tuning.path(), choices)
        tuning.read.cache_clear()
    print(f"wrote {tuning.path()}", flush=True)
    return choices


def _candidates(size: tuple[int, ...], choices: dict[str, Any]) -> Iterator[dict[str, int]]:
    """Yield row tiles for the plain kernels, numbers of warp groups for Hopper's own."""
    for tall in choices["tall"]:
        yield {"tall": tall, "groups": 0}
    for groups in choices["groups"][1:]:
        yield {"tall": choices["tall"][-1], "groups": groups}


def _step_time(inputs: list[list[Tensor]]) -> float:
    gradient = torch.randn_like(inputs[0][0])

    def step(args: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(cluster_attention(*args, backend="triton"), args, gradient)

    return harness.graph_time([partial(step, args) for args in inputs], repeats=2)


def _table(times: dict[tuple, float]) -> str:
    best = min(times.values())
    parts = []
    for candidate, time in sorted(times.items(), key=lambda item: item[1]):
        options = dict(candidate)
        name = f"{options['groups']} groups" if options["groups"] else f"{options['tall']} rows"
        parts.append(f"{name} {time:.1f} µs" + (" (chosen)" if time == best else ""))
    return ", ".join(parts)
