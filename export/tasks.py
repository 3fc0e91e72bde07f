"""Several tasks of one bundle: adapters that share a frozen backbone, with an output each.

Where outputs are compared, kept or handed on as one array they stand side by side, task after task:
[samples, classes of all tasks]. A bundle of one model has no tasks in this sense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadapt.decision import LIKELIEST, Decision
from fastadapt.errors import InputError

from .graph_input import NAME as IMAGES

MOST = 16  # outputs of a graph that a manifest may list
# The name of an output, part of a file's name, and of columns of results.
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"


@dataclass(frozen=True)
class Task:
    """One of several tasks.

    Attributes:
        name: of the task, and of its output.
        classes: names in the output's order.
        start: the first of its columns, where outputs stand side by side.
        decision: how probabilities become classes.
    """

    name: str
    classes: tuple[str, ...]
    start: int
    decision: Decision = LIKELIEST

    @property
    def columns(self) -> slice:
        """Its columns, where outputs stand side by side."""
        return slice(self.start, self.start + len(self.classes))


def place_side_by_side(tasks: Sequence[tuple[str, Sequence[str], Decision]]) -> tuple[Task, ...]:
    """Make tasks of names, classes and decisions, in the order of the outputs."""
    placed: list[Task] = []
    for name, classes, decision in tasks:
        start = placed[-1].columns.stop if placed else 0
        placed.append(Task(name, tuple(classes), start, decision))
    return tuple(placed)


def named_tasks(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a manifest's entries of several tasks; none for a bundle of one model."""
    return [entry for entry in manifest.get("tasks", ()) if entry.get("name")]


def tasks_of(manifest: Mapping[str, Any]) -> tuple[Task, ...]:
    """Return the tasks of a bundle; none for a bundle of one model."""
    return place_side_by_side(
        [
            (
                entry["name"],
                entry["labels"],
                Decision.from_dict(entry.get("decision"), f"the manifest's task {entry['name']}"),
            )
            for entry in named_tasks(manifest)
        ]
    )


def find_task(tasks: Sequence[Task], name: str) -> Task:
    """Return the task of a name.

    Raises:
        InputError: there is none.
    """
    for task in tasks:
        if task.name == name:
            return task
    known = ", ".join(task.name for task in tasks)
    raise InputError(
        f"there is no task {name!r}; expected one of {known}"
        if tasks
        else f"there is no task {name!r}: this is one model, without tasks"
    )


def check_names(names: Sequence[str]) -> None:
    """Raise InputError for names of tasks that cannot be, or that occur twice."""
    for name in names:
        if not re.fullmatch(NAME, name) or name == IMAGES:
            raise InputError(
                f"a task cannot be called {name!r} (letters, digits, '.', '_' and '-', at most 64; "
                f"not {IMAGES!r}): name the tasks with `tasks=...`"
            )
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:  # they name files, which not every system tells apart by case
            raise InputError(f"two tasks are called {name!r}: name the tasks with `tasks=...`")
        seen.add(name.lower())
    if len(names) > MOST:
        raise InputError(f"there are {len(names)} tasks; a bundle holds up to {MOST}")


def side_by_side(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Put a model's outputs side by side: [B, all outputs]."""
    if isinstance(outputs, Tensor):
        return outputs.flatten(1)
    return torch.cat([output.flatten(1) for output in outputs], dim=1)
