"""Figures in the README stand in a file under bench/results."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_demos_figures():
    result = json.loads((ROOT / "bench/results/demo.json").read_text())
    for name, key in (("CLAdapter", "adapter"), ("linear probe", "linear_probe")):
        scores = result[key]
        row = f"| {name} | {scores['accuracy']:.2%} | {scores['macro_f1']:.4f} |".replace("%", " %")
        assert row in README


def test_gdpls_figures():
    result = json.loads((ROOT / "bench/results/gdpl-transfer.json").read_text())
    table = (ROOT / "bench/results/gdpl-transfer.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith(("| CLIP", "| GDPL"))]
    assert rows and result
    assert all(row in README for row in rows)


def test_the_kernels_figures():
    results = json.loads((ROOT / "bench/results/h100.json").read_text())
    tables = results["benchmarks"]["cluster_attention"]["tables"]
    forward, backward = (
        {row["B × N × C"]: row for row in rows}
        for title, rows in tables.items()
        if title.startswith(("forward", "backward"))
    )
    for shape, f in forward.items():
        b = backward[shape]
        figures = [shape]
        for row in (f, b):
            figures += [row["ours"], row["compiled"], row["compiled / ours"]]
        assert f"| {' | '.join(figures)} |" in README


def test_every_picture_and_link_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
