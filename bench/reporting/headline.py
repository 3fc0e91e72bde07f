"""Choose the handful of figures that the README begins with.

Each row is one figure of a result file: what was done, how long it took, and how long an
alternative took.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..protocol import Results, Row


@dataclass(frozen=True)
class Figure:
    """One time of a benchmark, and the time to compare it with.

    Attributes:
        what: what was done, for a reader who knows neither benchmark nor package.
        benchmark: name of the benchmark.
        shape: which record.
        part: which part of it.
        baseline: the provider to compare with.
        called: what readers call that provider.
    """

    what: str
    benchmark: str
    shape: str
    part: str
    baseline: str
    called: str


STEPS = (
    Figure(
        "training step of the adapter, ViT-B/16, batch 8, features cached",
        "training",
        "vit_base_patch16_224, 8",
        "cached",
        "upstream",
        "the paper's code",
    ),
    Figure(
        "the same at batch 64, features not cached",
        "training",
        "vit_base_patch16_224, 64",
        "stage 1",
        "upstream",
        "the paper's code",
    ),
    Figure(
        "training step of GDPL, 32 images, 100 classes",
        "gdpl",
        "32 × 100",
        "training step",
        "upstream",
        "the paper's code",
    ),
)
KERNELS = (
    Figure(
        "cluster attention forward, 128 × 196 × 768",
        "cluster_attention",
        "128 × 196 × 768",
        "forward",
        "compiled",
        "`torch.compile`",
    ),
)
# Whole commands: job and baseline of the benchmark `end_to_end`, and what readers call them.
JOBS = (
    ("two stages", "plain", "`fastadapt train`, from image files, both stages", "PyTorch and timm"),
    ("GDPL", "upstream's loop", "`fastadapt gdpl`, from image files", "the paper's loop"),
)
# Tables of the deployment benchmark: the model, the best of ours, and what it is compared with.
MODEL, BATCH = "ViT-B/16", "256"
OURS = (
    "fastadapt fp8, CUDA graph",
    "fastadapt bf16, CUDA graph",
    "AOTInductor fp8, CUDA graph",
    "AOTInductor bf16, CUDA graph",
)
BASELINE = "bf16, torch.compile, CUDA graph"


def headline(results: Results, link: str) -> list[Row]:
    """Return the rows for which there are figures: whole commands, steps, kernels.

    Args:
        results: of one machine.
        link: of the file that holds them.
    """
    jobs = [_job(results, *job, link) for job in JOBS]
    steps = [_row(results, figure, link) for figure in STEPS]
    kernels = [_row(results, figure, link) for figure in KERNELS]
    return [row for row in (*jobs, *steps, _deployed(results, link), *kernels) if row]


def _job(
    results: Results, job: str, baseline: str, what: str, called: str, link: str
) -> Row | None:
    """Return a whole command as a row, both sides with warm caches; None if one was not timed."""
    result = results.benchmarks.get("end_to_end")
    lines = [] if result is None else result.timelines
    warm = {line.provider: line.total for line in lines if (line.job, line.start) == (job, "warm")}
    if not {"ours", baseline} <= set(warm):
        return None
    ours, theirs = warm["ours"], warm[baseline]
    factor = f"[{theirs / ours:.3g}×]({link})"
    return _columns(what, f"{ours:.3g} s", f"{theirs:.3g} s, {called}", factor)


def _row(results: Results, figure: Figure, link: str) -> Row | None:
    """Return a figure as a row; None where it was not measured."""
    result = results.benchmarks.get(figure.benchmark)
    records = [] if result is None else result.timed
    for record in records:
        part = record.parts.get(figure.part)
        if record.shape == figure.shape and part and {"ours", figure.baseline} <= set(part.times):
            ours, theirs = (part.times[name].median for name in ("ours", figure.baseline))
            factor = f"[{theirs / ours:.3g}×]({link})"
            return _columns(figure.what, _time(ours), f"{_time(theirs)}, {figure.called}", factor)
    return None


def _deployed(results: Results, link: str) -> Row | None:
    """Return images per second of the exported model, in the best precision that was measured."""
    result = results.benchmarks.get("deployment")
    for title, rows in ({} if result is None else result.tables).items():
        rates = {
            row["runtime"]: float(row[BATCH].replace(",", ""))
            for row in rows
            if re.fullmatch(r"[\d,]+", str(row.get(BATCH)))
        }
        ours = next((name for name in OURS if name in rates), None)
        if title.startswith(MODEL) and ours and BASELINE in rates:
            return _columns(
                f"exported {MODEL} with adapter, batch {BATCH}: {ours.partition(',')[0]}",
                f"{rates[ours]:,.0f} images/s",
                f"{rates[BASELINE]:,.0f} images/s, `torch.compile` in bf16",
                f"[{rates[ours] / rates[BASELINE]:.3g}×]({link})",
            )
    return None


def _columns(what: str, ours: str, theirs: str, factor: str) -> Row:
    return {"": what, "fastadapt": ours, "alternative": theirs, "factor": factor}


def _time(us: float) -> str:
    """Return a time with three digits, in ms where that is at least one."""
    return f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.3g} ms"
