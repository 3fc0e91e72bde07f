"""Writes the README's tables from the newest results:

``python -m fastadapt.bench.reporting.readme``

A block begins with ``<!-- bench: NAME MACHINE -->`` and ends with ``<!-- /bench -->``. NAME is a
benchmark, ``all`` of them, or ``plots``; MACHINE a word of the GPU's name. What is between is
replaced by what the newest file of that machine under ``bench/results`` has of it. The pictures are
drawn anew, of the newest of every benchmark.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import write_text

from .. import BENCHMARKS
from . import comparison, plots
from . import tables as report

BLOCK = re.compile(r"(<!-- bench: (\S+) (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def render(text: str, root: Path) -> str:
    """``text`` with every block written anew.

    Args:
        text: of the README.
        root: of the repository, for ``bench/results``.

    Raises:
        InputError: a block that names no benchmark.
    """
    files = comparison.newest_first(root / "bench" / "results")

    def block(match: re.Match) -> str:
        begin, name, machine, end = match.groups()
        return f"{begin}{_content(name, machine, files, root)}\n{end}"

    return BLOCK.sub(block, text)


def _content(name: str, machine: str, files: list[tuple[Path, dict]], root: Path) -> str:
    if name not in ("all", "plots", *BENCHMARKS):
        raise InputError(f"the README has a block for {name!r}, which is no benchmark")
    files = [file for file in files if machine in (file[1]["environment"].get("gpu") or "CPU")]
    if name == "plots":
        parts = _pictures(files, root)
    else:
        names = BENCHMARKS if name == "all" else [name]
        parts = [_newest(name, files, root) for name in names]
    return "\n\n".join(filter(None, parts)) or f"Not measured on an {machine} yet."


def draw(root: Path) -> list[Path]:
    """Pictures of every machine's newest results; returns what was written."""
    written = []
    machines: dict[Path, list[dict]] = {}
    for path, results in comparison.newest_first(root / "bench" / "results"):
        machines.setdefault(_machine_path(path, results), []).append(results)
    for path, found in machines.items():
        written += plots.write_plots(path, _gathered(found))
    return written


def _machine_path(path: Path, results: dict[str, Any]) -> Path:
    return path.with_name(f"{report.machine_name(results['environment'])}.json")


def _gathered(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Each benchmark from the first of these results that has it; of others than the first by name
    and commit."""
    gathered: dict[str, Any] = {}
    for name in BENCHMARKS:
        for results in found:
            if results["benchmarks"].get(name, {}).get("records"):
                commit = results["environment"]["commit"]
                title = name if results is found[0] else f"{name} ({commit})"
                gathered[title] = results["benchmarks"][name]
                break
    return {**found[0], "benchmarks": gathered}


def _pictures(files: list[tuple[Path, dict]], root: Path) -> list[str]:
    """Of the machine; or of the newest file that has some."""
    for path in [*(_machine_path(*file) for file in files[:1]), *(path for path, _ in files)]:
        found = [picture.relative_to(root) for picture in plots.paths(path) if picture.exists()]
        if found:
            return [f"![{plots.KINDS[p.stem.rpartition('-')[2]]}]({p.as_posix()})" for p in found]
    return []


def _newest(name: str, files: list[tuple[Path, dict]], root: Path) -> str | None:
    """The tables of a benchmark from the newest file that has some."""
    for path, results in files:
        result = results["benchmarks"].get(name, {})
        if result.get("tables") or report.summary(result):
            link = path.relative_to(root).with_suffix(".md").as_posix()
            return _tables(result, results["environment"], link)
    return None


def _tables(result: dict[str, Any], environment: dict[str, Any], link: str) -> str:
    machine = environment["gpu"] or "CPU"
    source = f"{machine}, commit {environment['commit']}, {environment['date'][:10]}"
    below = [f"{source}; all figures: [{link}]({link})."]
    if "tables" in result:
        shown = {title: result["tables"][title] for title in result.get("readme", result["tables"])}
        parts = [f"**{result['title']}**"] if "title" in result else []
        parts += [f"{title}:\n\n{report.markdown_table(rows)}" for title, rows in shown.items()]
        if result.get("left_out"):
            below = [f"Left out: {'; '.join(result['left_out'])}.", *below]
    else:
        parts = [f"**{result['title']}**", report.markdown_table(report.summary(result))]
        below = [*result["notes"], *below]
    return "\n\n".join([*parts, f"<sub>{' '.join(below)}</sub>"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    readme = root / "README.md"
    old = readme.read_text(encoding="utf-8")
    try:
        new = render(old, root)
    except InputError as error:
        print(f"fastadapt: {error}", file=sys.stderr)
        return 1
    if args.check:
        return int(new != old)
    draw(root)
    new = render(old, root)  # with the pictures
    if new != old:
        write_text(readme, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
