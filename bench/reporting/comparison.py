"""Two result files side by side: ``python -m fastadapt.bench.reporting.comparison OLD NEW``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import read_json

from . import tables as report

# Two runs of one program on one machine differ by this much in percent, whatever their spreads.
DRIFT = 2.0


@dataclass(frozen=True)
class Change:
    """One figure in two runs.

    Attributes:
        name: benchmark, shape, part and metric.
        provider: whose figure it is.
        before, after: µs or MiB.
        noise: in percent: the larger spread of the two (first to last decile), at least ``DRIFT``.
    """

    name: str
    provider: str
    before: float
    after: float
    noise: float

    @property
    def percent(self) -> float:
        """More than zero is worse: slower, or larger."""
        return 100 * (self.after / self.before - 1)

    @property
    def real(self) -> bool:
        return abs(self.percent) > self.noise


def load(name: str, folder: Path = report.RESULTS) -> dict[str, Any]:
    """Results from a file, or from the newest in ``folder`` of a commit (its first characters).

    Raises:
        InputError: there are none, or they hold no figures that can be compared.
    """
    if Path(name).exists():
        results = read_json(name)
    else:
        files = newest_first(folder)
        found = [r for _, r in files if str(r["environment"].get("commit", "")).startswith(name)]
        if not found:
            commits = sorted({str(r["environment"].get("commit")) for _, r in files})
            raise InputError(
                f"{name} is neither a file nor a commit with results under {folder}; "
                f"there are {', '.join(commits) or 'none'}"
            )
        results = found[0]
    if not any(True for _ in _figures(results)):
        raise InputError(f"{name} holds no figures with a spread: there is nothing to compare")
    return results


def newest_first(folder: Path = report.RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """All result files of ``fastadapt bench`` in a folder, by their dates."""
    files = [(path, read_json(path)) for path in sorted(folder.glob("*.json"))]
    files = [(p, r) for p, r in files if "benchmarks" in r and "environment" in r]
    return sorted(files, key=lambda file: file[1]["environment"]["date"], reverse=True)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every figure that both results hold."""
    old = dict(_figures(before))
    return [
        Change(
            " · ".join(key[:-1]),
            key[-1],
            report.center(old[key]),
            report.center(value),
            max(DRIFT, _spread(old[key]), _spread(value)),
        )
        for key, value in _figures(after)
        if key in old and report.center(old[key]) > 0
    ]


def worse(found: Sequence[Change], threshold: float) -> bool:
    """Whether a figure of ours got worse beyond noise and by more than ``threshold`` percent."""
    return any(c.provider == "ours" and c.real and c.percent > threshold for c in found)


def as_text(found: Sequence[Change], threshold: float) -> str:
    """What got better or worse beyond noise, the worst first."""
    real = sorted((c for c in found if c.real), key=lambda c: -c.percent)
    lines = [
        f"{c.percent:+7.1f} %  {c.provider}: {c.name}, {c.before:.4g} → {c.after:.4g} "
        f"(noise {c.noise:.1f} %)"
        for c in real
    ]
    ours = sum(c.provider == "ours" for c in real)
    lines.append(
        f"{len(found)} figures compared, {len(real)} changed beyond noise ({ours} of ours); "
        f"ours may get worse by {threshold:g} %. Baselines that moved, too, tell of the machine."
    )
    return "\n".join(lines)


def _figures(results: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Benchmark, shape, part, metric and provider to a figure."""
    for name, result in results["benchmarks"].items():
        for record in result.get("records", []):
            for part, values in record.get("parts", {}).items():
                for metric in report.METRICS:
                    for provider, value in values.get(metric, {}).items():
                        yield (name, record["shape"], part, metric, provider), value


def _spread(value: Any) -> float:
    """In percent of the median; memory has none."""
    if not isinstance(value, dict):
        return 0.0
    return 100 * (value["high"] - value["low"]) / value["median"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("old", help="a result file, or a commit")
    parser.add_argument("new", help="a result file, or a commit")
    parser.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT")
    args = parser.parse_args(arguments)
    try:
        found = changes(load(args.old), load(args.new))
    except InputError as error:
        print(f"fastadapt: {error}", file=sys.stderr)
        return 1
    print(as_text(found, args.threshold))
    return int(worse(found, args.threshold))


if __name__ == "__main__":
    sys.exit(main())
