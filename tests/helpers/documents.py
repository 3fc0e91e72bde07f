"""Read the Markdown documents, and give their snippets what they take from the reader."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.helpers.gdpl_models import tiny_clip
from tests.helpers.imagesets import make_folders
from tests.helpers.shallow_models import SHALLOW_CONVNEXT, SHALLOW_VIT

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETUP = re.compile(r"<!-- test: ((?:(?!-->).)*) -->\n\Z", re.DOTALL)
GENERATED = re.compile(r"<!-- bench: .*?<!-- /bench -->", re.DOTALL)
# Small models that stand in for those that snippets name.
STAND_INS = {"vit_": SHALLOW_VIT, "convnext_": SHALLOW_CONVNEXT}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its line, and the comment before it."""

    language: str
    text: str
    line: int
    setup: str


def blocks(document: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a document."""
    text = document.read_text()
    for match in FENCE.finditer(text):
        before = SETUP.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 2
        yield Block(match[1], match[2], line, before[1] if before else "")


def prose(document: Path) -> str:
    """Return a document without its fenced blocks and its generated parts."""
    return FENCE.sub("", GENERATED.sub("", document.read_text()))


def inline_code(document: Path) -> list[str]:
    """Return what stands between backticks, generated parts included."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", document.read_text()))


def command_lines(document: Path) -> Iterator[str]:
    """Yield the commands of the console blocks, without comments and joined where they go on."""
    for block in blocks(document):
        if block.language == "console":
            for line in block.text.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+# .*| *#.*\Z", "", line).strip()
                if command:
                    yield command


def stand_in_for_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small random models, always the same, in place of pretrained ones."""
    real = timm.create_model

    def create(name: str, pretrained: bool = False, **options):
        small = next((s for start, s in STAND_INS.items() if name.startswith(start)), name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return real(small, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)


def stand_in_for_open_clip(monkeypatch: pytest.MonkeyPatch):
    """Return open_clip, whose models are small and random."""
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "create_model", lambda name, **options: tiny_clip(layers=9))
    return open_clip


def training_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return two batches of images for test_vit, and their labels."""
    return [(torch.randn(2, 3, 160, 160), torch.tensor([0, 3])) for _ in range(2)]


def image_files(folder: Path) -> None:
    """Write two images, a.png and b.png."""
    for seed, name in enumerate(("a", "b")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")


def write_bundle(folder: Path) -> Path:
    """Train for an epoch and export to ``folder / "bundle"``."""
    import fastadapt as fa
    from fastadapt.export import export_run
    from fastadapt.train import TrainConfig, train

    data = make_folders(folder / "data", 16, classes=("lying", "upright"))
    config = fa.AdaptConfig(num_centers=2, rank=4, mlp_ratio=0.5)
    train(data, folder / "run", SHALLOW_VIT, TrainConfig(epochs=1), config, pretrained=False)
    return export_run(folder / "run", folder / "bundle", speed=False).bundle
