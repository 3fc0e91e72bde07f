"""Result files: where they are, how they are read, merged and written.

``bench/results`` holds a folder per GPU with one current ``results.json``, its tables as
``results.md`` and its pictures; see the README there for the provenance of each figure.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from fastadapt.errors import InputError
from fastadapt.files import read_json, write_json, write_text

from ..protocol import Result, Results, Tables
from . import tables as report

FOLDER = Path(__file__).parents[1] / "results"
FILE = "results.json"


def result_path(out: Path, gpu: str | None) -> Path:
    """Return the file to write: ``out``, or in the folder ``out`` ``MACHINE/results.json``.

    Raises:
        InputError: ``out`` ends in something other than .json and is no folder.
    """
    if out.suffix == ".json":
        return out
    if out.suffix and not out.is_dir():
        raise InputError(f"--json is {out}; expected a file that ends in .json, or a folder")
    return out / machine_folder(gpu) / FILE


def machine_folder(gpu: str | None) -> str:
    """Return a machine's name for folders, as "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", (gpu or "cpu").lower())


def read(path: Path) -> Results:
    """Read a result file.

    Raises:
        InputError: the file is missing, or holds something else.
    """
    try:
        return Results.from_json(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = report.one_line(error)
        raise InputError(f"{path} holds no results of fastadapt bench ({reason})") from None


def read_earlier(path: Path, gpu: str | None) -> Results:
    """Read what ``path`` holds of the same GPU; empty results where there is nothing of it."""
    try:
        found = read(path)
    except InputError:
        return Results(gpu)
    return found if found.gpu == gpu else Results(gpu)


def write(path: Path, results: Results) -> None:
    """Write a result file, whole or not at all."""
    write_json(path, results.to_json())


def current(folder: Path = FOLDER) -> dict[Path, Results]:
    """Return the current results of every machine under a folder, the newest first."""
    found = {path: read(path) for path in sorted(folder.glob(f"*/{FILE}"))}
    found = {path: results for path, results in found.items() if results.environments}
    newest = sorted(found, key=lambda path: found[path].environments[0].date, reverse=True)
    return {path: found[path] for path in newest}


def join_parts(result: Result, part: Tables, earlier: Result) -> Result:
    """Return a result with a benchmark's own tables, and what an earlier run had of other parts.

    Args:
        result: of this run, whose environment, title and notes count where ``part`` has none.
        part: all that this run has so far.
        earlier: results of the same benchmark; its other parts stay if they were measured at the
            same commit with the same versions (see :class:`fastadapt.bench.protocol.Tables`).
    """
    joined = dataclasses.replace(
        result,
        title=part.title or result.title,
        notes=list(part.notes) or result.notes,
        tables=part.tables,
        summary=part.summary,
        timelines=part.timelines,
        wrong=part.wrong,
        left_out=part.left_out,
    )
    now, then = result.environment, earlier.environment
    if not part.about or now is None or then is None or not now.same_code(then):
        return joined

    def others(lines: list[str]) -> list[str]:
        return [line for line in lines if not line.startswith(part.about)]

    def merged(before: list[str], after: list[str]) -> list[str]:
        return list(dict.fromkeys([*others(before), *after]))

    joined.tables = {t: earlier.tables[t] for t in others(list(earlier.tables))} | part.tables
    if earlier.summary is not None and part.summary is not None:
        joined.summary = merged(earlier.summary, part.summary)
    joined.notes = merged(earlier.notes, joined.notes)
    joined.wrong = merged(earlier.wrong, part.wrong)
    joined.left_out = merged(earlier.left_out, part.left_out)
    command = "; ".join(dict.fromkeys([*then.command.split("; "), *now.command.split("; ")]))
    joined.environment = dataclasses.replace(now, command=command)
    return joined


def write_markdown(path: Path, results: Results) -> None:
    """Write all tables of a result file beside it, with the ending ``.md``."""
    lines = [f"# Benchmark results: {results.gpu or 'CPU'}", ""]
    lines += [
        "Medians; ± is half the distance from the first to the last decile. GPU time is that of "
        "CUDA-graph replays over rotated inputs; a backward is the difference between both "
        "directions together and the forward. The floor is the larger of the times for the FLOPs "
        "and for the bytes that there must be at least, at the rates measured at the start of the "
        "run. A ratio is left out where a spread exceeds its median.",
    ]
    for name, result in results.benchmarks.items():
        lines += ["", f"## {result.title or name}", "", *_provenance(result)]
        for title, rows in report.tables(result).items():
            lines += ["", f"### {name}: {title}", "", report.markdown_table(rows)]
        for reason in result.left_out:
            lines += ["", f"Left out: {reason}."]
        if result.failed is not None:
            lines += ["", f"FAILED: {result.failed}"]
        for note in result.notes:
            lines += ["", note]
    write_text(path.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")


def _provenance(result: Result) -> list[str]:
    environment = result.environment
    if environment is None:
        return ["Not measured."]
    versions = ", ".join(f"{name} {value}" for name, value in environment.versions.items())
    machine = [f"{key} {value}" for key, value in environment.machine.items() if value is not None]
    return [
        f"- commit {environment.commit}, {environment.date}: `{environment.command}`",
        f"- {environment.name}, {environment.dtype}; copy {environment.copy_rate} TB/s, matrix "
        f"product {environment.product_rate} TFLOP/s; {', '.join(machine)}",
        f"- versions: {versions}",
    ]
