"""Results as tables: Markdown beside a result file, and the README's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import write_text

from ..operation import BOTH

Record = dict[str, Any]
METRICS = {"gpu_us": "GPU time", "wall_us": "wall time", "peak_mib": "peak memory"}
BASELINES = ("compiled", "upstream", "eager")  # the first that there is stands beside ours
TARGET = "target (H100)"
RESULTS = Path(__file__).parents[1] / "results"


def result_path(out: Path, environment: dict[str, Any]) -> Path:
    """The file to write: ``out``, or in the folder ``out`` one named after machine and commit."""
    if out.suffix == ".json":
        return out
    if out.suffix and not out.is_dir():
        raise InputError(f"--json is {out}; expected a file that ends in .json, or a folder")
    return out / f"{machine_name(environment)}-{environment['commit'] or 'unknown'}.json"


def machine_name(environment: dict[str, Any]) -> str:
    """The machine's, for files: ``"nvidia-h100-80gb-hbm3"``."""
    return re.sub(r"[^a-z0-9]+", "-", (environment["gpu"] or "cpu").lower())


def keep_earlier(path: Path, results: dict[str, Any]) -> None:
    """Adds to ``results`` what ``path`` holds of the same machine, commit and versions."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        then, now = found["environment"], results["environment"]
        same = all(then[key] == now[key] for key in ("gpu", "commit", "versions"))
        if not same or now["commit"] is None or now["commit"].endswith("-dirty"):
            return
        results["benchmarks"] = dict(found["benchmarks"])
        if now["command"] not in then["command"].split("; "):
            now["command"] = f"{then['command']}; {now['command']}"
        else:
            now["command"] = then["command"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # nothing there, or something else


def joined(earlier: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A part of a benchmark, and what an earlier run had of others; see :mod:`fastadapt.bench`."""
    part = dict(part)
    about = tuple(part.pop("about", ()))
    if not about or "tables" not in earlier:
        return part
    others = {t: rows for t, rows in earlier["tables"].items() if not t.startswith(about)}
    part["tables"] = others | part["tables"]
    for key in ("readme", "wrong", "notes", "left_out"):
        kept = [line for line in earlier.get(key, ()) if not line.startswith(about)]
        part[key] = list(dict.fromkeys([*kept, *part.get(key, ())]))
    return part


def one_line(error: Exception) -> str:
    """An error in words, without its traceback."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def by_metric(part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A part's metrics that were measured for ours, with what all providers got."""
    for metric in METRICS:
        if "ours" in part.get(metric, {}):
            yield metric, part[metric]


def center(value: dict[str, float] | float) -> float:
    """The median of a spread; memory is one number."""
    return value["median"] if isinstance(value, dict) else value


def best_baseline(values: dict[str, Any]) -> str | None:
    """The fastest that computes the same without our kernels; ``None`` if there is none."""
    others = [name for name in values if name in BASELINES]
    return min(others, key=lambda name: center(values[name]), default=None)


def tables(result: dict[str, Any]) -> dict[str, list[Record]]:
    """All tables of a benchmark by title: one per part and metric."""
    if "tables" in result:
        return result["tables"]
    found: dict[str, list[Record]] = {}
    records = result.get("records", [])
    timed = [r for r in records if "parts" in r]
    for name in dict.fromkeys(part for r in timed for part in r["parts"]):
        for metric, title in METRICS.items():
            parts = [(r, r["parts"].get(name, {})) for r in timed]
            parts = [(r, part) for r, part in parts if "ours" in part.get(metric, {})]
            if parts:
                unit = _unit(metric, [part[metric] for _, part in parts])
                providers = list(dict.fromkeys(p for _, part in parts for p in part[metric]))
                providers.sort(key=lambda p: p != "ours")
                found[f"{name}, {title} in {unit}"] = [
                    {r["dimensions"]: r["shape"]} | _row(part, metric, unit, providers)
                    for r, part in parts
                ]
    wrong = [
        {"shape": r["shape"], "name": name, **{k: f"{v:.1e}" for k, v in values.items()}}
        for r in records
        for name, values in r.get("wrong", {}).items()
    ]
    if wrong:
        found["WRONG RESULTS, not timed (errors against higher precision)"] = wrong
    failed = [
        {"shape": r["shape"], "provider": name, "why": str(why)}
        for r in records
        for name, why in _failures(r)
    ]
    if failed:
        found["providers that failed"] = failed
    return found


def summary(result: dict[str, Any]) -> list[Record]:
    """One row per shape, one column per part: ours / a baseline (how many times as fast)."""
    timed = [r for r in result.get("records", []) if "parts" in r]
    rows: list[Record] = [{record["dimensions"]: record["shape"]} for record in timed]
    for part in dict.fromkeys(name for r in timed for name in r["parts"]):
        measured = [r["parts"].get(part, {}) for r in timed]
        for metric in _shown(part, {m for p in measured for m, _ in by_metric(p)}):
            values = [p.get(metric, {}) for p in measured]
            unit = _unit(metric, values)
            known = ("dense", *BASELINES)
            base = next((name for name in known if any(name in v for v in values)), None)
            head = f"{part}, {unit}: ours" + (f" / {base}" if base else "")
            for row, value in zip(rows, values, strict=True):
                row[head] = _pair(value, base, unit, ratio=metric != "peak_mib")
    return rows


def markdown_table(rows: Sequence[Record]) -> str:
    """Rows as a Markdown table; where a row lacks a column, a dash."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row.get(head) for head in heads]
        lines.append("| " + " | ".join("–" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines)


def write_markdown(path: Path, results: dict[str, Any]) -> None:
    """All tables of a result file beside it, with the ending ``.md``."""
    environment = dict(results["environment"])
    versions = environment.pop("versions", {})
    lines = ["# Benchmark results", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items() if value is not None]
    lines += ["- versions: " + ", ".join(f"{name} {value}" for name, value in versions.items())]
    lines += [
        "",
        "Medians; ± is half the distance from the first to the last decile. GPU time is that of "
        "CUDA-graph replays over rotated inputs; a backward is the difference between both "
        "directions together and the forward. The floor is the larger of the FLOPs and the bytes "
        "that there must be at least, over the rates measured at the start of the run.",
    ]
    for name, result in results["benchmarks"].items():
        lines += ["", f"## {result.get('title', name)}"]
        for title, rows in tables(result).items():
            lines += ["", f"### {name}: {title}", "", markdown_table(rows)]
        for reason in result.get("left_out", []):
            lines += ["", f"Left out: {reason}."]
        if "failed" in result:
            lines += ["", f"FAILED: {result['failed']}"]
        for note in result.get("notes", []):
            lines += ["", note]
    write_text(path.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")


def _row(part: dict, metric: str, unit: str, providers: list[str]) -> Record:
    values = part[metric]
    row: Record = {name: _value(values.get(name), unit) for name in providers}
    base = best_baseline(values)
    row["ours over best baseline"] = None if base is None else f"{_ratio(values, base)} ({base})"
    whose = "gpu_us" if "gpu_us" in part else "wall_us"
    if metric != whose:
        return row  # floor and target are of GPU time, where that was measured
    if "floor_us" in part:
        row["floor"] = _value(part["floor_us"], unit)
        row["of floor"] = f"{100 * part['floor_us'] / center(values['ours']):.0f} %"
    return row | _targets(part, values, unit)


def _targets(part: dict, values: dict, unit: str) -> Record:
    """What was asked for, and whether it was met."""
    ours = center(values["ours"])
    if "target_us" in part:
        limits = part["target_us"]
        met = [ours <= limit for limit in limits]
        text = " / ".join(_value(float(limit), unit) for limit in limits)
        word = "no" if not met[0] else "yes" if len(met) == 1 else "both" if all(met) else "first"
        return {TARGET: text, "met": word}
    if "target_speedup" in part:
        factor, base = part["target_speedup"]
        if base not in values:
            return {TARGET: f"{factor}× {base}", "met": None}
        met = center(values[base]) / ours >= factor
        return {TARGET: f"{factor}× {base}", "met": "yes" if met else "no"}
    return {}


def _shown(part: str, metrics: set[str]) -> list[str]:
    """GPU time if there is any, else wall time; memory once, with whole steps."""
    time = "gpu_us" if "gpu_us" in metrics else "wall_us"
    if part == BOTH:  # forward and backward are shown by themselves
        return [m for m in ("peak_mib",) if m in metrics]
    return [m for m in (time, "peak_mib") if m in metrics and (m == time or part != "forward")]


def _pair(values: dict[str, Any], base: str | None, unit: str, ratio: bool) -> str | None:
    """Ours, the baseline's and, on request, how many times as fast ours is."""
    if "ours" not in values:
        return None
    cell = _value(values["ours"], unit, spread=False)
    if base is not None:
        cell += f" / {_value(values.get(base), unit, spread=False) or '–'}"
    if ratio and base in values:
        cell += f" ({_ratio(values, base)})"
    return cell


def _ratio(values: dict[str, Any], base: str | None) -> str | None:
    if base not in values or "ours" not in values:
        return None
    return f"{center(values[base]) / center(values['ours']):.2f}×"


def _unit(metric: str, measured: list[dict[str, Any]]) -> str:
    if metric == "peak_mib":
        return "MiB"
    return "ms" if min(center(v) for values in measured for v in values.values()) >= 1000 else "µs"


def _value(value: dict | float | None, unit: str, spread: bool = True) -> str | None:
    if value is None:
        return None
    scale = 1e-3 if unit == "ms" else 1
    middle = center(value) * scale
    digits = 0 if middle >= 1000 or unit == "MiB" else 1 if middle >= 10 else 2
    if not spread or not isinstance(value, dict):
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ± {(value['high'] - value['low']) / 2 * scale:.{digits}f}"


def _failures(record: Record) -> Iterator[tuple[str, Any]]:
    yield from record.get("failed", {}).items()
    for part, metrics in record.get("parts", {}).items():
        for name, why in metrics.get("failed", {}).items():
            yield f"{name}, {part}", why
