"""Tables of a benchmark: one per part and metric, a summary, and an overview of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..operation import BOTH
from ..protocol import METRICS, Part, Record, Result, Results, Row, Spread, center

BASELINES = ("compiled", "upstream", "eager")  # the first that there is stands beside ours
TARGET = "target (H100)"
WRONG = "WRONG RESULTS, not timed (errors against higher precision)"
Values = Mapping[str, Spread | float]


def one_line(error: BaseException) -> str:
    """Return an error as one line, without its traceback."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def best_baseline(values: Values) -> str | None:
    """Return the fastest provider that computes the same without our kernels, if any does."""
    others = [name for name in values if name in BASELINES]
    return min(others, key=lambda name: center(values[name]), default=None)


def ratio(values: Values, base: str | None) -> float | None:
    """Return how many times as fast as ``base`` ours is.

    ``None`` where either was not measured, or has a spread that exceeds its median.
    """
    if base is None or base not in values or "ours" not in values:
        return None
    both = values[base], values["ours"]
    if any(isinstance(value, Spread) and value.noisy for value in both):
        return None
    return center(both[0]) / center(both[1])


def tables(result: Result) -> dict[str, list[Row]]:
    """Return all tables of a benchmark by title: its own, or one per part and metric."""
    found: dict[str, list[Row]] = dict(result.tables)
    for name in _part_names(result.timed):
        for metric, title in METRICS.items():
            measured = [
                (record, part)
                for record in result.timed
                if (part := record.parts.get(name)) and "ours" in part.values(metric)
            ]
            if measured:
                unit = _unit(metric, [part.values(metric) for _, part in measured])
                providers = list(dict.fromkeys(p for _, m in measured for p in m.values(metric)))
                providers.sort(key=lambda p: p != "ours")
                found[f"{name}, {title} in {unit}"] = [
                    {record.dimensions: record.shape} | _row(part, metric, unit, providers)
                    for record, part in measured
                ]
    wrong = [
        {"shape": record.shape, "name": name, **{k: f"{v:.1e}" for k, v in values.items()}}
        for record in result.records
        for name, values in record.wrong.items()
    ]
    if wrong:
        found[WRONG] = wrong
    failed = [
        {"shape": record.shape, "provider": name, "why": why}
        for record in result.records
        for name, why in _failures(record)
    ]
    if failed:
        found["providers that failed"] = failed
    return found


def summary(result: Result) -> list[Row]:
    """Return one row per shape, one column per part: ours / a baseline (times as fast)."""
    timed = result.timed
    rows: list[Row] = [{record.dimensions: record.shape} for record in timed]
    for name in _part_names(timed):
        measured = [record.parts.get(name, Part()) for record in timed]
        for metric in _shown(name, measured):
            values = [part.values(metric) for part in measured]
            unit = _unit(metric, values)
            known = ("dense", *BASELINES)
            base = next((b for b in known if any(b in v for v in values)), None)
            head = f"{name}, {unit}: ours" + (f" / {base}" if base else "")
            for row, value in zip(rows, values, strict=True):
                row[head] = _pair(value, base, unit, with_ratio=metric != "peak_mib")
    return rows


def overview(results: Results) -> list[Row]:
    """Return one row per benchmark and part: the first shape's time, and the range of ratios.

    The baseline is the fastest that was measured; the range is over all shapes, so that it shows
    where ours loses.
    """
    rows = []
    for name, result in results.benchmarks.items():
        for part_name in _part_names(result.timed):
            if part_name == BOTH:
                continue  # forward and backward are shown by themselves
            rows += _overview_row(name, part_name, result.timed)
    return rows


def markdown_table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table; where a row lacks a column, a dash."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row.get(head) for head in heads]
        lines.append("| " + " | ".join("–" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines)


def _overview_row(name: str, part_name: str, timed: list[Record]) -> list[Row]:
    measured = [(r, r.parts[part_name].times) for r in timed if part_name in r.parts]
    found = [(r, times, best_baseline(times)) for r, times in measured if "ours" in times]
    if not found:
        return []
    record, times, base = found[0]
    unit = _unit("gpu_us", [times])
    factors = [f for _, times, b in found if (f := ratio(times, b)) is not None]
    first = ratio(times, base)
    return [
        {
            "benchmark": f"{name}, {part_name}",
            "shape": record.shape,
            "ours": f"{_value(times['ours'], unit, spread=False)} {unit}",
            "fastest baseline": None
            if base is None
            else f"{_value(times[base], unit, spread=False)} {unit} ({base})",
            "times as fast": None if first is None else f"{first:.2f}×",
            "over all shapes": f"{min(factors):.2f} to {max(factors):.2f}×"
            if len(factors) > 1
            else None,
        }
    ]


def _part_names(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.parts))


def _row(part: Part, metric: str, unit: str, providers: list[str]) -> Row:
    values = part.values(metric)
    row: Row = {name: _value(values.get(name), unit) for name in providers}
    base = best_baseline(values)
    factor = ratio(values, base)
    row["ours over best baseline"] = None if factor is None else f"{factor:.2f}× ({base})"
    whose = "gpu_us" if part.gpu_us else "wall_us"
    if metric != whose:
        return row  # floor and target are of GPU time, where that was measured
    if part.floor_us is not None:
        row["floor"] = _value(part.floor_us, unit)
        row["of floor"] = f"{100 * part.floor_us / center(values['ours']):.0f} %"
    return row | _targets(part, values, unit)


def _targets(part: Part, values: Values, unit: str) -> Row:
    """Return what was asked for, and whether it was met."""
    ours = center(values["ours"])
    if part.target_us:
        met = [ours <= limit for limit in part.target_us]
        text = " / ".join(str(_value(float(limit), unit)) for limit in part.target_us)
        word = "no" if not met[0] else "yes" if len(met) == 1 else "both" if all(met) else "first"
        return {TARGET: text, "met": word}
    if part.target_speedup is not None:
        factor, base = part.target_speedup
        reached = ratio(values, base)
        met_word = None if reached is None else "yes" if reached >= factor else "no"
        return {TARGET: f"{factor:g}× {base}", "met": met_word}
    return {}


def _shown(name: str, measured: list[Part]) -> list[str]:
    """Return GPU time if there is any, else wall time; memory once, with whole steps."""
    metrics = [m for m in METRICS if any("ours" in part.values(m) for part in measured)]
    time = "gpu_us" if "gpu_us" in metrics else "wall_us"
    if name == BOTH:  # forward and backward are shown by themselves
        return [m for m in metrics if m == "peak_mib"]
    return [m for m in metrics if m == time or (m == "peak_mib" and name != "forward")]


def _pair(values: Values, base: str | None, unit: str, with_ratio: bool) -> str | None:
    """Return ours, the baseline's and, on request, how many times as fast ours is."""
    if "ours" not in values:
        return None
    cell = str(_value(values["ours"], unit, spread=False))
    if base is not None:
        cell += f" / {_value(values.get(base), unit, spread=False) or '–'}"
    factor = ratio(values, base) if with_ratio else None
    return cell if factor is None else f"{cell} ({factor:.2f}×)"


def _unit(metric: str, measured: Sequence[Values]) -> str:
    if metric == "peak_mib":
        return "MiB"
    return "ms" if min(center(v) for values in measured for v in values.values()) >= 1000 else "µs"


def _value(value: Spread | float | None, unit: str, spread: bool = True) -> str | None:
    if value is None:
        return None
    scale = 1e-3 if unit == "ms" else 1
    middle = center(value) * scale
    digits = 0 if middle >= 1000 or unit == "MiB" else 1 if middle >= 10 else 2
    if not spread or not isinstance(value, Spread):
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ± {value.width / 2 * scale:.{digits}f}"


def _failures(record: Record) -> Iterator[tuple[str, str]]:
    yield from record.failed.items()
    for name, part in record.parts.items():
        for provider, why in part.failed.items():
            yield f"{provider}, {name}", why
