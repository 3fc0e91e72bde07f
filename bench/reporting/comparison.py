"""Compare two result files: ``python -m fastadapt.bench.reporting.comparison OLD NEW``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastadapt.errors import InputError

from ..protocol import METRICS, Results, Spread, center
from . import results as stored

# Two runs of one program on one machine differ by this much in percent, whatever their spreads.
DRIFT = 2.0


@dataclass(frozen=True)
class Change:
    """One figure in two runs.

    Attributes:
        name: benchmark, shape, part and metric.
        provider: whose figure it is.
        before, after: in µs or MiB.
        noise: the larger spread of the two (first to last decile) in percent, at least ``DRIFT``.
    """

    name: str
    provider: str
    before: float
    after: float
    noise: float

    @property
    def percent(self) -> float:
        """Return the change in percent: above zero is worse, slower or larger."""
        return 100 * (self.after / self.before - 1)

    @property
    def real(self) -> bool:
        """Whether the change exceeds the noise."""
        return abs(self.percent) > self.noise


def load(name: str, folder: Path = stored.FOLDER) -> Results:
    """Read results to compare with.

    Args:
        name: a result file, a machine's folder under ``folder``, or the beginning of a commit:
            then what results under ``folder`` hold of that commit.
        folder: holds a folder of results per machine.

    Raises:
        InputError: there are none, or they hold no figures that can be compared.
    """
    if Path(name).is_file():
        results = stored.read(Path(name))
    elif (folder / name / stored.FILE).is_file():
        results = stored.read(folder / name / stored.FILE)
    else:
        results = _of_commit(name, stored.current(folder).values())
    if not any(True for _ in _figures(results)):
        raise InputError(f"{name} holds no figures with a spread: there is nothing to compare")
    return results


def _of_commit(name: str, found: Iterable[Results]) -> Results:
    """Return the benchmarks that were measured at a commit, on the machine of the newest."""
    commits = set()
    for results in found:
        commits |= {str(environment.commit) for environment in results.environments}
        chosen = {
            key: result
            for key, result in results.benchmarks.items()
            if result.environment and str(result.environment.commit).startswith(name)
        }
        if chosen:
            return Results(results.gpu, chosen)
    raise InputError(
        f"{name} is neither a file nor a machine or commit with results; "
        f"there are {', '.join(sorted(commits)) or 'none'}"
    )


def changes(before: Results, after: Results) -> list[Change]:
    """Return the change of every figure that both results hold."""
    old = dict(_figures(before))
    return [
        Change(
            " · ".join(key[:-1]),
            key[-1],
            center(old[key]),
            center(value),
            max(DRIFT, _percent(old[key]), _percent(value)),
        )
        for key, value in _figures(after)
        if key in old and center(old[key]) > 0
    ]


def worse(found: Sequence[Change], threshold: float) -> bool:
    """Return whether a figure of ours got worse beyond noise and by over ``threshold`` percent."""
    return any(c.provider == "ours" and c.real and c.percent > threshold for c in found)


def as_text(found: Sequence[Change], threshold: float) -> str:
    """Return what got better or worse beyond noise as lines, the worst first."""
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


def _figures(results: Results) -> Iterator[tuple[tuple[str, ...], Spread | float]]:
    """Yield benchmark, shape, part, metric and provider, and their figure."""
    for name, result in results.benchmarks.items():
        for record in result.records:
            for part_name, part in record.parts.items():
                for metric in METRICS:
                    for provider, value in part.values(metric).items():
                        yield (name, record.shape, part_name, metric, provider), value


def _percent(value: Spread | float) -> float:
    """Return a spread in percent of its median; memory has none."""
    if not isinstance(value, Spread):
        return 0.0
    return 100 * value.width / value.median


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison of two results; return 1 if ours got worse."""
    parser = argparse.ArgumentParser(description="Compare two result files.")
    parser.add_argument("old", help="a result file, a machine's folder, or a commit")
    parser.add_argument("new", help="a result file, a machine's folder, or a commit")
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
