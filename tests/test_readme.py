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


def test_every_picture_and_link_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
