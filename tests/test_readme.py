"""Figures in README and docs stand in a file under bench/results, or in the code."""

import json
import math
import re
from pathlib import Path

import pytest

from fastadapt.bench.suites.transfer import table
from fastadapt.export.parity import THRESHOLDS
from fastadapt.export.precision.int8 import LEAST_SPEEDUP
from tests.helpers.documents import DOCUMENTS, ROOT, prose

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results"
FIGURE = re.compile(
    r"(?<![\w.-])(\d[\d,]*(?:\.\d+)?(?: ?%| µs| ms| s\b| minutes|×(?! \d))|\d+\.\d{2,})"
)
DEFINITIONS = {"95 %"}  # the level of an interval
# Written by hand beside their sources, or by tools that have tests of their own.
# The tables of accuracy.md have a test of their own.
OTHERS = {"benchmarks.md", "performance-notes.md", "command-line.md", "CONTRIBUTING.md"}
OTHERS |= {"accuracy.md"}


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def scores(values: dict) -> list[str]:
    return [f"{values['accuracy']:.2%}".replace("%", " %"), f"{values['macro_f1']:.4f}"]


def demo_figures() -> set[str]:
    demo = read("demo.json")
    minutes = math.ceil(demo["seconds"] / 60)
    return {f"{minutes} minutes", *scores(demo["adapter"]), *scores(demo["linear_probe"])}


def gdpl_rows() -> list[str]:
    lines = (RESULTS / "gdpl-transfer.md").read_text().splitlines()
    return [line for line in lines if line.startswith(("| CLIP", "| GDPL"))]


def gdpl_figures() -> set[str]:
    found = {f"{read('gdpl-transfer.json')['seconds']:.0f} s"}
    for row in gdpl_rows():
        found |= set(FIGURE.findall(row))
    return found


def prediction_figures() -> set[str]:
    """Return the figures of the prediction benchmark's tables."""
    texts = (file.read_text() for file in RESULTS.glob("predict-*.md"))
    return {figure for text in texts for figure in FIGURE.findall(text)}


def scaling_figures() -> set[str]:
    """Return the times of the scaling benchmark's steps, and how many times one GPU's rate."""
    tables = read("scaling-h200.json")["benchmarks"]["scaling"]["tables"]
    rows = tables["weak scaling"]
    steps = [row[key] for row in rows for key in ("step, ms", "without exchange, ms") if key in row]
    times = [row[key] for row in rows for key in ("times one GPU", "epochs, times one GPU")]
    return {f"{float(step):.2f} ms" for step in steps if step} | set(times)


def fused_figures() -> set[str]:
    """Return how many times as fast as torch.compile in bf16 the fused runtime is."""
    tables = read("nvidia-h100-80gb-hbm3/results.json")["benchmarks"]["deployment"]["tables"]
    found = set()
    for title, rows in tables.items():
        if "images per second" in title:
            speeds = {row["runtime"]: row for row in rows}
            rival = speeds["bf16, torch.compile, CUDA graph"]
            for name in ("fastadapt bf16, CUDA graph", "fastadapt fp8, CUDA graph"):
                for batch in ("8", "64", "256"):
                    ours, theirs = (row[batch].replace(",", "") for row in (speeds[name], rival))
                    found.add(f"{float(ours) / float(theirs):.2f}")
    return found


def task_figures() -> set[str]:
    """Return what passes of graphs of several tasks take, and their files."""
    rows, found = read("tasks-cpu.json")["rows"], set[str]()
    alone = {(row["backbone"], row["batch"]): row for row in rows if row["tasks"] == 1}
    for row in rows:
        first = alone[row["backbone"], row["batch"]]
        found |= {f"{row['milliseconds']:.{places}f} ms" for places in (0, 1)}
        found.add(f"{row['milliseconds'] / first['milliseconds']:.2f}×")
    return found


def campaign_figures() -> set[str]:
    """Return how long the campaigns of random calls took."""
    files = RESULTS.glob("*/random-calls-*.json")
    return {f"{json.loads(file.read_text())['seconds']:.0f} s" for file in files}


def limits() -> set[str]:
    """Return the limits of the gate as the documents write them."""
    faster = f"{LEAST_SPEEDUP - 1:.0%}".replace("%", " %")
    return {f"{limit.error:g}" for limit in THRESHOLDS.values()} | {faster}


def test_the_demos_figures():
    demo = read("demo.json")
    adapter, probe = scores(demo["adapter"]), scores(demo["linear_probe"])
    assert (
        f"CLAdapter reaches {adapter[0]} accuracy and a macro-F1 of {adapter[1]}, "
        f"a linear probe {probe[0]} and {probe[1]}"
    ) in README
    assert f"On {demo['images']['test']} test images" in README


def test_gdpls_table():
    page = (ROOT / "docs/gdpl.md").read_text()
    assert gdpl_rows() and all(row in page for row in gdpl_rows())


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.name not in OTHERS], ids=lambda d: d.name
)
def test_every_figure_is_known(document: Path):
    known = demo_figures() | gdpl_figures() | prediction_figures() | limits() | DEFINITIONS
    known |= scaling_figures() | campaign_figures() | task_figures()
    known |= {f"{times}×" for times in fused_figures()}
    for line in prose(document).splitlines():
        for figure in FIGURE.findall(re.sub("`[^`]*`", "", line)):
            assert figure in known, f"{figure} in: {line}"


def test_the_benchmarks_tables():
    """After a new run: make docs."""
    from fastadapt.bench.reporting import documents

    for name in documents.DOCUMENTS:
        path = ROOT / name
        assert documents.render(path.read_text(), path, ROOT) == path.read_text(), name


def test_the_tables_of_accuracy():
    page = (ROOT / "docs/accuracy.md").read_text()
    best = "best recipe, CLAdapter, pyramid"
    pairs = (
        ["linear probe", "default"],
        ["head alone, default", "default"],
        ["default, no refit", "default"],
        ["default", "default, 3 seeds"],
        ["default", "pyramid with deviations"],
        ["default, no average", "pyramid, no average"],
        ["best recipe, linear head", best],
        [best, f"{best}, 3 seeds"],
    )
    for methods in pairs:
        for row in table(read("transfer.json")["runs"], methods):
            if len(row) < 4:  # the best recipe is of the solar cells alone
                continue
            backbone = row["backbone"].removeprefix("tf_efficientnet_").title()
            cells = [row["images"], backbone, *list(row.values())[2:]]
            line = f"| {' | '.join(cells)} |"
            assert re.sub(r"(?<=[( ])-(?=\d)", "−", line) in page
