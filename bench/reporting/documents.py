"""Write the benchmark tables of documents: ``python -m fastadapt.bench.reporting.documents``.

A block begins with ``<!-- bench: NAME MACHINE -->`` and ends with ``<!-- /bench -->``; what is
between is replaced. NAME is a benchmark, ``all`` of them, ``headline`` (a handful of figures),
``overview`` (one row for each part of each benchmark) or ``plots``; MACHINE a word of the
GPU's name, whose current results under ``bench/results`` are taken. Pictures and ``results.md`` of
every machine are written anew, too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from fastadapt.errors import InputError
from fastadapt.files import write_text

from ..protocol import Result, Results
from ..runner import NAMES
from . import plots
from . import results as stored
from . import tables as report
from .headline import headline

BLOCK = re.compile(r"(<!-- bench: (\S+) (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
DOCUMENTS = ("README.md", "docs/benchmarks.md")


def render(text: str, document: Path, root: Path) -> str:
    """Return a document with every block written anew.

    Args:
        text: the document as it is.
        document: its path, which links are relative to.
        root: of the repository, for ``bench/results``.

    Raises:
        InputError: a block that names no benchmark.
    """
    current = stored.current(root / "bench" / "results")

    def block(match: re.Match[str]) -> str:
        begin, name, machine, end = match.groups()
        if name not in ("all", "headline", "overview", "plots", *NAMES):
            raise InputError(f"{document.name} has a block for {name!r}, which is no benchmark")
        for path, results in current.items():
            if machine in (results.gpu or "CPU"):
                link = Path(os.path.relpath(path, document.parent))
                content = _content(name, results, path, link)
                break
        else:
            content = ""
        return f"{begin}{content or f'Not measured on an {machine} yet.'}\n{end}"

    return BLOCK.sub(block, text)


def draw(root: Path) -> list[Path]:
    """Write pictures and Markdown of every machine's results; return the pictures."""
    written = []
    for path, results in stored.current(root / "bench" / "results").items():
        stored.write_markdown(path, results)
        written += plots.write_plots(path, results)
    return written


def _content(name: str, results: Results, path: Path, link: Path) -> str:
    """Return what stands in a block; nothing where nothing was measured."""
    if name == "plots":
        beside = {kind: link.parent / picture.name for kind, picture in plots.paths(path).items()}
        there = [kind for kind, picture in plots.paths(path).items() if picture.exists()]
        return "\n\n".join(f"![{plots.KINDS[k]}]({beside[k].as_posix()})" for k in there)
    all_figures = f"all figures: [{path.parent.name}]({link.with_suffix('.md').as_posix()})."
    if name in ("headline", "overview"):
        below = link.with_suffix(".md").as_posix()
        rows = headline(results, below) if name == "headline" else report.overview(results)
        if not rows:
            return ""
        commits = ", ".join(dict.fromkeys(str(e.commit) for e in results.environments))
        source = f"{results.gpu or 'CPU'}, commits {commits}; {all_figures}"
        return f"{report.markdown_table(rows)}\n\n<sub>{source}</sub>"
    names = NAMES if name == "all" else [name]
    found = [_tables(results.benchmarks.get(key, Result()), all_figures) for key in names]
    return "\n\n".join(filter(None, found))


def _tables(result: Result, all_figures: str) -> str:
    """Return the tables of one benchmark that documents show, and where they are from."""
    environment = result.environment
    if environment is None or not (result.tables or result.timed):
        return ""
    source = f"{environment.name}, commit {environment.commit}, {environment.date[:10]}; "
    below = [source + all_figures]
    parts = [f"**{result.title}**"]
    if result.tables:
        titles = list(result.tables) if result.summary is None else result.summary
        parts += [f"{t}:\n\n{report.markdown_table(result.tables[t])}" for t in titles]
        if result.left_out:
            below = [f"Left out: {'; '.join(result.left_out)}.", *below]
    else:
        parts.append(report.markdown_table(report.summary(result)))
        below = [*result.notes, *below]
    return "\n\n".join([*parts, f"<sub>{' '.join(below)}</sub>"])


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """Write the documents, or with ``--check`` return 1 if one of them is out of date."""
    parser = argparse.ArgumentParser(description="Write the benchmark tables of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one differs")
    args = parser.parse_args(arguments)
    root = root or Path(__file__).resolve().parents[2]
    try:
        if not args.check:
            draw(root)
        stale = [name for name in DOCUMENTS if not _is_current(root / name, root, args.check)]
    except InputError as error:
        print(f"fastadapt: {error}", file=sys.stderr)
        return 1
    if stale and args.check:
        print(f"fastadapt: out of date: {', '.join(stale)}", file=sys.stderr)
    return int(bool(stale) and args.check)


def _is_current(document: Path, root: Path, check: bool) -> bool:
    """Return whether a document is up to date; write it if it is not and may be written."""
    old = document.read_text(encoding="utf-8")
    new = render(old, document, root)
    if new != old and not check:
        write_text(document, new)
    return new == old


if __name__ == "__main__":
    sys.exit(main())
