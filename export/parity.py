"""How well two models agree: the numbers that an export and ``fastadapt verify`` decide on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from fastadapt.errors import InputError, counted

from .tasks import Task


class GateError(InputError):
    """Report a model whose outputs differ from the reference; the exit code is then not 0."""


@dataclass(frozen=True)
class Thresholds:
    """The limits of a parity check; the defaults are for models in fp32.

    Attributes:
        error: largest absolute difference, over the reference's spread. fp32 arithmetic in
            another order gives 1e-6 to 1e-4 on the backbones that are tested; a wrong weight,
            scale or normalisation 1e-2 and more. At 1e-3 a logit moves by a thousandth of how
            much it varies from image to image.
        cosine: smallest cosine of all samples. An error within its limit implies it; it is stated
            because other tools report it, so that results can be compared.
        origin: length below which a sample's cosine is left out, over the spread times the square
            root of the number of outputs. Outputs nearer to the origin have no direction to speak
            of: an error within its limit turns them by more than the cosine allows. At most 1,
            which some sample always reaches.
        spread: smallest spread, over the largest output. Below 1e-4 fp32 rounding is itself 1e-3
            of the spread: the model answers every image alike, and agreement says nothing.
    """

    error: float = 1e-3
    cosine: float = 0.9999
    origin: float = 0.1
    spread: float = 1e-4


# Half precision rounds at every layer: the worst output of what is right is off by 0.5 to 2 % of
# the spread in fp16 on the backbones that are tested, eight times that in bf16, where some need
# fp32 layers. 8 bit is judged by its accuracy on the validation split (precision/int8.py); its
# limits only tell an engine that works from one that does not.
THRESHOLDS = {
    "fp32": Thresholds(),
    "fp16": Thresholds(error=0.05, cosine=0.999, origin=0.7),
    "bf16": Thresholds(error=0.1, cosine=0.99, origin=0.7),
    "int8": Thresholds(error=1.0, cosine=0.5, origin=0.7),
    "fp8": Thresholds(error=1.0, cosine=0.5, origin=0.7),
}
# A graph that resizes rounds some pixels to the next level: its input changes, not its model.
RESIZED = Thresholds(error=0.05, cosine=0.999)


@dataclass(frozen=True)
class Parity:
    """How well two models agree on the same samples; made by :func:`compare`.

    Attributes:
        stage: names the two models.
        batch: batch size of the candidate; 0 if unknown.
        samples: number of samples.
        error: largest absolute difference, over the spread of the reference.
        cosine: smallest cosine of a sample's two outputs, those near the origin left out.
        top1: share of samples with the same highest output, near ties left out; ``None`` with
            fewer than two classes or nothing but near ties.
        near_ties: samples whose two highest outputs are closer than the error that is allowed.
        spread: how much the reference varies from sample to sample, over its largest value.
        problems: why it fails; empty if it passes.
        limit: the error that is allowed.
    """

    stage: str
    batch: int
    samples: int
    error: float | None = None
    cosine: float | None = None
    top1: float | None = None
    near_ties: int | None = None
    spread: float | None = None
    problems: tuple[str, ...] = ()
    limit: float = Thresholds.error

    @property
    def passed(self) -> bool:
        """Whether every limit was kept."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the entry that a manifest holds."""
        return {**asdict(self), "problems": list(self.problems), "passed": self.passed}


def compare(
    reference: Any,
    candidate: Any,
    *,
    stage: str = "",
    batch: int = 0,
    classes: bool = True,
    thresholds: Thresholds = Thresholds(),
) -> Parity:
    """Compare the outputs of two models on the same samples.

    The scale of the error is the *spread* of the reference: the standard deviation of every output
    over the samples, root mean square over the outputs. It measures what the outputs tell the
    samples apart by. The largest value would not do: a common offset, or a model that answers
    every image nearly alike, makes any error look small beside it.

    Args:
        reference: [samples, outputs], an array or CPU tensor.
        candidate: the same of the other model.
        stage: names the two models in the result.
        batch: batch size of the candidate, for the result.
        classes: whether the outputs are classes, so that the highest one means something.
        thresholds: the limits.

    Returns:
        A :class:`Parity`. NaN or infinity in either never pass, nor do outputs that do not vary.
    """
    a = np.asarray(reference, dtype=np.float64)
    b = np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2:
        return Parity(stage, batch, len(a), problems=(f"shapes {a.shape} and {b.shape} differ",))
    for name, values in (("reference", a), ("candidate", b)):
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).any(axis=1).sum())
            reason = f"the {name} gives NaN or infinity for {bad} of {counted(len(a), 'sample')}"
            return Parity(stage, batch, len(a), problems=(reason,))

    tiny = np.finfo(np.float64).tiny
    spread = math.sqrt(a.var(axis=0).mean())
    error = min(np.abs(a - b).max() / max(spread, tiny), 1e300)  # finite, as JSON has numbers
    relative_spread = spread / max(np.abs(a).max(), tiny)
    length = np.linalg.norm(a, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(length * np.linalg.norm(b, axis=1), tiny)
    cosine = cosines[length >= thresholds.origin * spread * math.sqrt(a.shape[1])].min()
    top1, near_ties = None, None
    if classes and a.shape[1] > 1:
        highest = np.sort(a, axis=1)
        # Each of the two may move by the error that is allowed.
        decided = highest[:, -1] - highest[:, -2] > 2 * thresholds.error * spread
        near_ties = int((~decided).sum())
        if decided.any():
            top1 = float((a.argmax(axis=1) == b.argmax(axis=1))[decided].mean())

    problems = []
    if not relative_spread >= thresholds.spread:
        problems.append(
            f"the reference varies by only {relative_spread:.1e} of its largest value from sample "
            f"to sample (at least {thresholds.spread:.0e} is needed): agreement says nothing"
        )
    elif not error <= thresholds.error:
        problems.append(f"error {error:.1e} of the spread (at most {thresholds.error:.0e})")
    if not cosine >= thresholds.cosine:
        problems.append(f"cosine {cosine:.6f} (at least {thresholds.cosine})")
    if top1 is not None and top1 < 1:
        problems.append(f"another class for {1 - top1:.1%} of the samples that are no near ties")
    return Parity(
        stage,
        batch,
        len(a),
        float(error),
        float(cosine),
        top1,
        near_ties,
        float(relative_spread),
        tuple(problems),
        thresholds.error,
    )


def compare_tasks(
    reference: Any,
    candidate: Any,
    tasks: Sequence[Task],
    *,
    stage: str = "",
    batch: int = 0,
    classes: bool = True,
    thresholds: Thresholds = Thresholds(),
) -> list[Parity]:
    """Compare as :func:`compare` does, the columns of each task by themselves.

    Args:
        reference: [samples, outputs], those of the tasks side by side.
        candidate: the same of the other model.
        tasks: whose columns are compared; all columns at once where there are none.
        stage, batch, classes, thresholds: as for :func:`compare`; stages then name the task.
    """

    def check(a: Any, b: Any, stage: str) -> Parity:
        return compare(a, b, stage=stage, batch=batch, classes=classes, thresholds=thresholds)

    a, b = np.asarray(reference), np.asarray(candidate)
    if not tasks or a.shape != b.shape:
        return [check(a, b, stage)]
    return [
        check(a[:, task.columns], b[:, task.columns], f"{stage}, {task.name}") for task in tasks
    ]


def worst(parities: Sequence[Parity], tasks: Sequence[Task]) -> Parity:
    """Return the comparison that failed, or has the largest error; its problems name the task.

    Args:
        parities: what :func:`compare_tasks` returned.
        tasks: that it got.
    """
    if len(parities) != len(tasks):
        return parities[0]
    named = [
        replace(p, problems=tuple(f"{task.name}: {problem}" for problem in p.problems))
        for p, task in zip(parities, tasks, strict=True)
    ]
    return max(named, key=lambda p: (not p.passed, math.inf if p.error is None else p.error))


def check_problems(parities: Iterable[Parity]) -> list[str]:
    """Return every reason why comparisons failed, with stage and batch size."""
    return [
        f"{parity.stage} at batch {parity.batch}: {problem}"
        for parity in parities
        for problem in parity.problems
    ]


def parity_table(parities: Iterable[Parity], title: str = "parity") -> Table:
    """Make a table for the terminal: one row per stage and batch size."""
    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left")
    table.add_column("stage", no_wrap=True)
    for column in ("batch", "error", "at most", "cosine", "top-1", ""):
        table.add_column(column, justify="right")
    for p in parities:
        table.add_row(
            p.stage,
            str(p.batch or "–"),
            "–" if p.error is None else f"{p.error:.1e}",
            f"{p.limit:.0e}",
            "–" if p.cosine is None else f"{p.cosine:.6f}",
            "–" if p.top1 is None else f"{p.top1:.0%}",
            "[green]✓[/]" if p.passed else "[red]✗[/]",
        )
    return table
