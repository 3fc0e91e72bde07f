"""``fastadapt export``: a training run to a folder that can be deployed, behind a gate.

Everything is made in a temporary folder beside the target and renamed at the end. A bundle whose
outputs differ from the trained model's is kept as ``BUNDLE.rejected``, with the reasons in its
manifest, and what was at ``BUNDLE`` stays as it was.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from fastadapt import __version__
from fastadapt.adapt import AdaptedModel
from fastadapt.checkpoint import CONFIG, WEIGHTS, load_adapter
from fastadapt.errors import InputError
from fastadapt.export.fold import FoldReport, fold_with_report
from fastadapt.export.onnx import INPUT, export_onnx
from fastadapt.export.verify import (
    BATCHES,
    FORMAT,
    GOLDEN,
    MANIFEST,
    MODEL,
    SCHEMA,
    GateError,
    Inputs,
    Parity,
    Thresholds,
    check_problems,
    compare,
    compare_onnx,
    model_input,
    onnx_session,
    parity_table,
)
from fastadapt.files import read_json, sha256_file, write_json, write_tensors, write_text
from fastadapt.gdpl.checkpoint import FORMAT as GDPL_FORMAT
from fastadapt.gdpl.checkpoint import load_gdpl
from fastadapt.gdpl.features import FeatureTable
from fastadapt.gdpl.model import GDPLModel
from fastadapt.info import versions
from fastadapt.preprocess import Preprocess, is_image_file

LABELS, SPLITS = "labels.txt", "splits.csv"
DOMAIN_INPUT = "domain_features"
GOLDEN_SAMPLES = 16
FEWEST_SAMPLES = max(BATCHES)


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export_run` wrote.

    Attributes:
        bundle: the folder.
        manifest: its ``manifest.json``.
        fold_report: every folded layer.
        parities: every comparison of the gate.
    """

    bundle: Path
    manifest: dict[str, Any]
    fold_report: FoldReport
    parities: tuple[Parity, ...]


@dataclass(frozen=True)
class _Sample:
    path: Path
    label: str | None


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    weights: str | None = None,
    images: str | Path | None = None,
    normalize: bool = True,
    overwrite: bool = False,
    backbone: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
    domain_input: bool = False,
    domain_features: str | Path | None = None,
    domain_weights: str | None = None,
    console: Console | None = None,
) -> ExportResult:
    """Folds a run's model, exports it to ONNX and writes a bundle, if the outputs agree.

    Args:
        run: a training run's folder, or what :func:`fastadapt.save_adapter` or
            :func:`fastadapt.gdpl.save_gdpl` wrote.
        out: the bundle's folder.
        weights: a local file of the backbone's (GDPL: the CLIP model's) weights, where the
            recorded one is gone.
        images: a folder of images for the gate and the golden samples, instead of the run's
            validation split.
        normalize: put the normalisation into the graph.
        overwrite: replace a bundle that is at ``out``.
        backbone: the pretrained backbone (GDPL: the CLIP model), if it was given as a module.
        class_names: GDPL only: other classes than those it was trained on.
        domain_input: GDPL only: leave the domain encoder out of the graph, which then has the
            features as its second input, ``domain_features`` [batch, D_f]. Always so for models
            that were made for features computed before.
        domain_features: the features of the images that are compared, for such models
            (:class:`fastadapt.gdpl.FeatureTable`).
        domain_weights: GDPL only: a local file of the domain encoder's weights, as ``weights``.
        console: where to tell what is going on; nowhere if ``None``.

    Returns:
        An :class:`ExportResult`.

    Raises:
        GateError: the outputs differ; the bundle is kept as ``out`` + ``.rejected``.
        InputError: something is missing or damaged, or cannot be folded or exported; nothing was
            written.
    """
    run, out = Path(run), Path(out)
    rejected = out.with_name(out.name + ".rejected")
    console = console or Console(quiet=True)
    _check_target(out, overwrite)
    _check_target(rejected, overwrite=True)
    if not run.is_dir():
        raise InputError(f"{run} is no folder; expected a training run with {CONFIG} and {WEIGHTS}")
    config = read_json(run / CONFIG)
    samples = _choose(_list_samples(run, images), GOLDEN_SAMPLES)

    with _step(console, "load the trained model"):
        model = _load(run, config, backbone, weights, class_names, domain_weights)
        domain = _domain_features(model, domain_input, domain_features, samples)
        preprocess, labels = _preprocess(config, model), _labels(config, model)
        pixels = torch.stack([preprocess.read(sample.path) for sample in samples])
        normalized = preprocess.normalize(pixels)
        others = {} if domain is None else {DOMAIN_INPUT: domain(normalized)}
        example = (normalized, *others.values())
    with _step(console, "fold"):
        folded, report = fold_with_report(model, tuple(x[:2] for x in example))
        if others:
            folded.domain_encoder = None
    console.print(f"  {report.summary}")
    source = {
        "run": str(run),
        "config": config,
        "config_sha256": sha256_file(run / CONFIG),
        "adapter_sha256": sha256_file(run / WEIGHTS),
    }
    preprocessing = {**preprocess.to_dict(), "normalization_in_graph": normalize}

    with _staging(out) as folder:
        with _step(console, "export to ONNX"):
            described = export_onnx(
                folded,
                folder / MODEL,
                input_size=preprocess.input_size,
                other_inputs={name: tuple(x.shape[1:]) for name, x in others.items()},
                normalize=preprocess if normalize else None,
                labels=labels,
                metadata={
                    "preprocessing": preprocessing,
                    "fastadapt": __version__,
                    "backbone": _backbone_name(config),
                    "run_sha256": source["config_sha256"],
                    "adapter_sha256": source["adapter_sha256"],
                },
            )
        with _step(console, f"compare on {len(samples)} images at batch {_listed(BATCHES)}"):
            expected = _outputs(model, example, batch=8)
            inputs = {
                INPUT: model_input(pixels.numpy(), preprocessing),
                **{name: x.numpy() for name, x in others.items()},
            }
            parities = _gate(folder / MODEL, folded, example, inputs, expected, bool(labels))
        console.print(parity_table(parities))
        write_text(folder / LABELS, "".join(f"{label}\n" for label in labels))
        _write_golden(folder / GOLDEN, samples, {INPUT: pixels, **others}, expected)
        problems = check_problems(parities)
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "accepted": not problems,
            "problems": problems,
            "model": {"file": MODEL, **described},
            "labels": labels,
            "preprocessing": preprocessing,
            "source": source,
            "versions": versions(),
            "fold_report": report.to_dict(),
            "parity": [parity.to_dict() for parity in parities],
            "thresholds": asdict(Thresholds()),
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
                for file in sorted(folder.iterdir())
            },
        }
        write_json(folder / MANIFEST, manifest)
        manifest = read_json(folder / MANIFEST)
        _place(folder, rejected if problems else out)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise GateError(f"the export was rejected: {problems[0]}{more}. It is kept in {rejected}")
    console.print(_file_table(out, manifest))
    return ExportResult(out, manifest, report, tuple(parities))


def _gate(
    file: Path,
    folded: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Inputs,
    expected: np.ndarray,
    classes: bool,
) -> list[Parity]:
    """Unfolded against folded, folded against ONNX Runtime, and the first against the last."""
    parities = []
    for batch in BATCHES:
        outputs = _outputs(folded, example, batch)
        parities.append(compare(expected, outputs, stage="folding", batch=batch, classes=classes))
    references = {"ONNX Runtime": outputs, "end to end": expected}
    try:
        session = onnx_session(file)
    except InputError as error:
        return [*parities, Parity("ONNX Runtime", 0, len(expected), problems=(str(error),))]
    return parities + compare_onnx(session, inputs, references, classes)


def _write_golden(
    path: Path, samples: list[_Sample], inputs: dict[str, Tensor], expected: np.ndarray
) -> None:
    """What the model gets (images in uint8), and what the trained model says to it."""
    files = json.dumps([sample.path.name for sample in samples], ensure_ascii=False)
    labels = json.dumps([sample.label for sample in samples], ensure_ascii=False)
    tensors = {**inputs, "expected": torch.from_numpy(expected)}
    write_tensors(path, tensors, {"files": files, "labels": labels})


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Tensor, ...], batch: int) -> np.ndarray:
    batches = zip(*(x.split(batch) for x in inputs), strict=True)
    parts = [model(*part).flatten(1) for part in batches]
    return torch.cat(parts).float().numpy()


def _load(
    run: Path,
    config: dict[str, Any],
    backbone: nn.Module | None,
    weights: str | None,
    class_names: Sequence[str] | None,
    domain_weights: str | None,
) -> AdaptedModel | GDPLModel:
    if config.get("format") == GDPL_FORMAT:
        return load_gdpl(
            run,
            backbone,
            clip_weights=weights,
            class_names=class_names,
            domain_weights=domain_weights,
        )
    if class_names is not None:
        raise InputError(
            f"{run} is no GDPL run: its classes are outputs of its head, so that others need "
            "training; leave out --classes"
        )
    return load_adapter(run, backbone, weights=weights)


def _domain_features(
    model: AdaptedModel | GDPLModel,
    wanted: bool,
    file: str | Path | None,
    samples: list[_Sample],
) -> Callable[[Tensor], Tensor] | None:
    """What gives the features of the normalised images of ``samples``; None if no input of the
    graph is to be theirs.

    Raises:
        InputError: the model takes none; it has no encoder, and the file is not given, or lacks
            an image; it has one, and a file is given.
    """
    if not isinstance(model, GDPLModel):
        if wanted or file is not None:
            raise InputError("this run is no GDPL run: leave out --domain-input/--domain-features")
        return None
    if model.domain_encoder is None:
        if file is None:
            raise InputError(
                "this model has no domain encoder, and the gate compares on real features: give "
                "those of the images with --domain-features"
            )
        table = FeatureTable.read(file, model.prompt_learner.feature_dim)
        features = table.of([sample.path for sample in samples])
        return lambda _: features
    if file is not None:
        raise InputError("this model has a domain encoder of its own: leave out --domain-features")
    return torch.no_grad()(model.domain_features) if wanted else None


def _backbone_name(config: dict[str, Any]) -> str:
    gdpl = config.get("format") == GDPL_FORMAT
    return config["source"]["clip"] if gdpl else config["backbone"]["name"]


def _preprocess(config: dict[str, Any], model: AdaptedModel | GDPLModel) -> Preprocess:
    if config.get("preprocess") is not None:
        return Preprocess.from_dict(config["preprocess"])
    return Preprocess.from_pretrained_cfg(model.pretrained_cfg)


def _labels(config: dict[str, Any], model: AdaptedModel | GDPLModel) -> list[str]:
    if isinstance(model, GDPLModel):
        return list(model.class_names)
    labels = config.get("labels")
    if labels is None:
        return [str(index) for index in range(model.num_classes)]
    if len(labels) != model.num_classes:
        raise InputError(
            f"{CONFIG} names {len(labels)} labels; the model has {model.num_classes} classes"
        )
    return [str(label) for label in labels]


def _list_samples(run: Path, images: str | Path | None) -> list[_Sample]:
    """The images that the gate may use: a folder's, or those of the run's validation split."""
    remedy = "give a folder of images like the training's with --images"
    if images is not None:
        root = Path(images)
        if not root.is_dir():
            raise InputError(f"--images {root} is no folder")
        files = sorted(path for path in root.rglob("*") if path.is_file() and is_image_file(path))
        samples = [
            _Sample(path, path.parent.name if path.parent != root else None) for path in files
        ]
        where = f"{root} holds"
    elif (run / SPLITS).is_file():
        with (run / SPLITS).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or {"path", "label", "split"} - set(rows[0]):
            raise InputError(f"{run / SPLITS} lacks rows of path, label and split: {remedy}")
        samples = [_Sample(Path(r["path"]), r["label"]) for r in rows if r["split"] == "val"]
        where = f"the validation split of {run} has"
        gone = [sample.path for sample in samples if not sample.path.is_file()]
        if gone:
            raise InputError(
                f"{len(gone)} of the {len(samples)} validation images of {run} are not there any "
                f"more, {gone[0]} for one: {remedy}"
            )
    else:
        raise InputError(
            f"{run} records no images ({SPLITS}), and the gate compares on real ones: {remedy}"
        )
    if len(samples) < FEWEST_SAMPLES:
        raise InputError(
            f"{where} {len(samples)} images; the gate needs at least {FEWEST_SAMPLES}: {remedy}"
        )
    return samples


def _choose(samples: list[_Sample], count: int) -> list[_Sample]:
    """As many of every class as possible, the same ones every time."""
    shuffled = sorted(samples, key=lambda sample: sample.path)
    random.Random(0).shuffle(shuffled)
    seen: dict[str | None, int] = {}
    ranked = []
    for sample in shuffled:
        seen[sample.label] = seen.get(sample.label, 0) + 1
        ranked.append((seen[sample.label], sample))
    return [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])][:count]


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuses before any work what must not be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    is_bundle = (target / MANIFEST).is_file() and (
        read_json(target / MANIFEST).get("format") == FORMAT
    )
    if not is_bundle:
        raise InputError(f"{target} exists and is no bundle: choose another name with --out")
    if not overwrite:
        raise InputError(f"{target} exists: replace it with --overwrite, or choose another --out")


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``; gone afterwards unless it was renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    try:
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        yield folder
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"no space left on the disk of {out.parent.absolute()}: free some and export again. "
            "Nothing was written."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(folder: Path, target: Path) -> None:
    """Renames ``folder`` to ``target``; what is there goes only when its successor is in place."""
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_name(f"{folder.name}.old")
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    with console.status(f"{what} …"):
        yield
    console.print(f"[green]✓[/] {what}")


def _file_table(out: Path, manifest: dict[str, Any]) -> Table:
    table = Table(title=f"bundle {escape(str(out))}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("file")
    table.add_column("MB", justify="right")
    for name in (*manifest["files"], MANIFEST):
        table.add_row(name, f"{(out / name).stat().st_size / 1e6:.2f}")
    return table


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
