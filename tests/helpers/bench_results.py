"""Results of a benchmark as a GPU would give them, and how a file holds them."""

import json
from pathlib import Path

from fastadapt.bench.operation import BOTH
from fastadapt.bench.protocol import Environment, Part, Record, Result, Results, Spread

H100 = "NVIDIA H100 80GB HBM3"


def spread(value: float, width: float) -> Spread:
    """A spread around ``value``, ``width`` of it wide."""
    half = value * width / 2
    return Spread(value, value - half, value + half)


def environment_of(
    *, date: str = "2026-01-01", commit: str = "abc1234", gpu: str = H100, command: str = "bench"
) -> Environment:
    return Environment(date, command, commit, gpu, "bfloat16", 3.0, 700.0, {"torch": "2"})


def results_of(
    *, ours: float = 50.0, compiled: float = 80.0, width: float = 0.01, **environment: str
) -> Results:
    """One operation at two shapes."""

    def part(factor: float) -> Part:
        return Part(
            flops=1e10 * factor,
            bytes=1e7 * factor,
            floor_us=20.0 * factor,
            target_us=(40.0 * factor, 30.0 * factor),
            gpu_us={
                "ours": spread(ours * factor, width),
                "compiled": spread(compiled * factor, width),
            },
            peak_mib={"ours": 10.0, "compiled": 20.0},
        )

    records = [
        Record(
            shape=f"{size} × 2",
            dimensions="batch × tokens",
            size=2 * size,
            failed={"upstream": "out of memory"},
            parts={"forward": part(size), "backward": part(2 * size), BOTH: part(3)},
        )
        for size in (1, 2)
    ]
    where = environment_of(**environment)
    result = Result(where, "Cluster attention", ["A note."], records)
    return Results(where.gpu, {"cluster_attention": result})


def write(path: Path, results: Results) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results.to_json()))
    return path
