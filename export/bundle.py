"""``fastadapt export``: a trained model to a folder that can be deployed, behind a gate.

Everything is made in a temporary folder beside the target and renamed at the end. A bundle whose
outputs differ from the trained model's is kept as ``BUNDLE.rejected``, with the reasons in its
manifest, and what was at ``BUNDLE`` stays as it was.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
from fastadapt.errors import InputError
from fastadapt.export.artefact import FAILED, Artefact
from fastadapt.export.engines import EngineOptions, artefact_problems, build_artefacts
from fastadapt.export.engines import Source as EngineSource
from fastadapt.export.fold import FoldReport, fold_with_report
from fastadapt.export.gate import BATCHES, Inputs, compare_onnx, onnx_session
from fastadapt.export.graph_input import NAME, Deployed, GraphInput, check_settings
from fastadapt.export.manifest import (
    FORMAT,
    GOLDEN,
    LABELS,
    MANIFEST,
    MODEL,
    REPORT,
    SCHEMA,
    environment,
    list_files,
)
from fastadapt.export.onnx import export_onnx
from fastadapt.export.parity import (
    GateError,
    Parity,
    Thresholds,
    check_problems,
    compare,
    parity_table,
)
from fastadapt.export.quantize import Images
from fastadapt.export.report import render_report
from fastadapt.export.samples import (
    GOLDEN_SAMPLES,
    Pixels,
    Sample,
    Samples,
    choose,
    folder_samples,
    read_pixels,
    run_samples,
    synthetic_samples,
)
from fastadapt.export.sources import Trained, load_run, load_timm, read_run
from fastadapt.export.staging import check_target, place, staging
from fastadapt.files import read_json, write_json, write_tensors, write_text

END_TO_END = "end to end"
DOMAIN_INPUT = "domain_features"
FEWEST_SAMPLES = max(BATCHES)
# The graph's filter rounds some pixels to the next level: a change of the input, not of the model.
RESIZED = Thresholds(error=0.05, cosine=0.999)


@dataclass(frozen=True)
class ExportSettings:
    """How a bundle is made, whatever it is made of.

    Attributes:
        input: ``"uint8"`` or ``"float"``; see :class:`GraphInput`.
        normalize: put the normalisation into the graph.
        resize: put resizing and cropping into the graph, too.
        overwrite: replace a bundle that is at the target.
        speed: measure images per second.
        engines: what is built beside the fp32 ONNX file.
    """

    input: str = "uint8"
    normalize: bool = True
    resize: bool = False
    overwrite: bool = False
    speed: bool = True
    engines: EngineOptions = field(default_factory=EngineOptions)

    def check(self) -> None:
        """Raises InputError, before any work, for what excludes each other or cannot be had."""
        check_settings(self.input, self.normalize, self.resize)
        wanted = self.engines
        if self.resize and (wanted.trt or wanted.aoti or wanted.int8 or wanted.precision != "fp32"):
            raise InputError(
                "--resize is for the fp32 ONNX file alone (TensorRT has no antialiased filter): "
                "leave out --trt, --aoti, --int8 and --precision, or resize before the graph"
            )
        wanted.check()


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export_run` and :func:`export_timm` wrote.

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


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    weights: str | None = None,
    images: str | Path | None = None,
    backbone: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
    domain_input: bool = False,
    domain_features: str | Path | None = None,
    domain_weights: str | None = None,
    console: Console | None = None,
    **settings: Any,
) -> ExportResult:
    """Folds a run's model, exports it and writes a bundle, if the outputs agree.

    Args:
        run: a training run's folder, or what :func:`fastadapt.save_adapter` or
            :func:`fastadapt.gdpl.save_gdpl` wrote.
        out: the bundle's folder.
        weights: a local file of the backbone's (GDPL: the CLIP model's) weights, where the
            recorded one is gone.
        images: a folder of images for the gate and the golden samples, instead of the run's
            validation split.
        backbone: the pretrained backbone (GDPL: the CLIP model), if it was given as a module.
        class_names: GDPL only: other classes than those it was trained on.
        domain_input: GDPL only: leave the domain encoder out of the graph, which then has the
            features as its second input, ``domain_features`` [batch, D_f]. Always so for models
            that were made for features computed before.
        domain_features: the features of the images that are compared, for such models
            (:class:`fastadapt.gdpl.FeatureTable`).
        domain_weights: GDPL only: a local file of the domain encoder's weights, as ``weights``.
        console: where to tell what is going on; nowhere if ``None``.
        **settings: of :class:`ExportSettings`.

    Returns:
        An :class:`ExportResult`.

    Raises:
        GateError: the outputs differ; the bundle is kept as ``out`` + ``.rejected``.
        InputError: something is missing or damaged, or cannot be folded or exported; nothing was
            written.
    """
    run, export = Path(run), _Export(Path(out), ExportSettings(**settings), console)
    config = read_run(run)
    samples = run_samples(run, images, FEWEST_SAMPLES)
    with export.step("load the trained model"):
        trained = load_run(
            run,
            config,
            backbone=backbone,
            weights=weights,
            class_names=class_names,
            domain_input=domain_input,
            domain_features=domain_features,
            domain_weights=domain_weights,
        )
    return export.run(trained, samples)


def export_timm(
    name: str,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    peft: str | Path | None = None,
    weights: str | Path | None = None,
    image_size: int | None = None,
    images: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    console: Console | None = None,
    **settings: Any,
) -> ExportResult:
    """:func:`export_run` for a timm model without a run: fine-tuned elsewhere, or with a LoRA.

    Args:
        name: timm's name of the model.
        out: the bundle's folder.
        checkpoint, peft, weights, image_size, class_names: as for
            :func:`fastadapt.export.sources.load_timm`.
        images: a folder of images for the gate and the golden samples. Without one they are
            synthetic, and the manifest says so.
        console, **settings: as for :func:`export_run`.

    Returns:
        An :class:`ExportResult`.

    Raises:
        GateError, InputError: as for :func:`export_run`.
    """
    export = _Export(Path(out), ExportSettings(**settings), console)
    samples = None if images is None else folder_samples(images, FEWEST_SAMPLES)
    with export.step("load the trained model"):
        trained = load_timm(
            name,
            checkpoint=checkpoint,
            peft=peft,
            weights=weights,
            image_size=image_size,
            class_names=class_names,
        )
    return export.run(trained, samples or synthetic_samples(trained.preprocess))


class _Export:
    """One export, from a trained model to the bundle in its place.

    Refuses bad settings and targets when it is made, before any work.
    """

    def __init__(self, out: Path, settings: ExportSettings, console: Console | None):
        settings.check()
        self.out, self.settings = out, settings
        self.rejected = out.with_name(out.name + ".rejected")
        self.console = console or Console(quiet=True)
        check_target(out, settings.overwrite)
        check_target(self.rejected, overwrite=True)

    def run(self, trained: Trained, samples: Samples) -> ExportResult:
        """Folds, exports, compares, writes. Raises GateError and InputError."""
        material = self._prepare(trained, samples)
        with staging(self.out) as folder:
            with self.step("export to ONNX"):
                described = material.write_onnx(material.folded, folder / MODEL)
            with self.step(f"compare on {len(material.chosen)} images at batch {_listed(BATCHES)}"):
                parities = _gate(folder / MODEL, material)
            self.console.print(parity_table(parities))
            problems = check_problems(parities)
            if problems:
                artefacts = [_failed_onnx(folder, problems)]
            else:
                source = _engine_source(folder, material, parities, self.settings.speed)
                artefacts = build_artefacts(self.settings.engines, source, self.console)
                problems = artefact_problems(artefacts)
            write_text(folder / LABELS, "".join(f"{label}\n" for label in trained.labels))
            _write_golden(folder / GOLDEN, material)
            manifest = {
                "format": FORMAT,
                "schema": SCHEMA,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "accepted": not problems,
                "problems": problems,
                "model": {"file": MODEL, **described},
                "labels": trained.labels,
                "preprocessing": material.graph_input.to_dict(),
                "backbone": {"name": trained.backbone, "pretrained_cfg": trained.pretrained_cfg},
                "source": trained.source,
                "golden": {
                    "file": GOLDEN,
                    "samples": len(material.chosen),
                    "origin": samples.origin,
                },
                "environment": environment(),
                "fold_report": material.fold_report.to_dict(),
                "parity": [parity.to_dict() for parity in parities],
                "thresholds": asdict(Thresholds()),
                "artefacts": [artefact.to_dict() for artefact in artefacts],
                "files": list_files(folder),
            }
            # The report shows every hash but its own, which comes last.
            write_text(folder / REPORT, render_report(manifest, material.chosen, material.expected))
            manifest["files"] = list_files(folder)
            write_json(folder / MANIFEST, manifest)
            manifest = read_json(folder / MANIFEST)
            place(folder, self.rejected if problems else self.out)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise GateError(
                f"the export was rejected: {problems[0]}{more}. It is kept in {self.rejected}"
            )
        self.console.print(_file_table(self.out, manifest))
        return ExportResult(self.out, manifest, material.fold_report, tuple(parities))

    def _prepare(self, trained: Trained, samples: Samples) -> _Material:
        """Reads the images and folds the model."""
        settings = self.settings
        if settings.engines.int8:
            _check_int8(trained, samples)
        graph_input = GraphInput(
            trained.preprocess, settings.input, settings.normalize, settings.resize
        )
        chosen = choose(samples.samples, GOLDEN_SAMPLES)
        pixels = read_pixels(chosen, graph_input)
        normalized = trained.preprocess.normalize(pixels.model)
        others = {}
        if trained.domain_features is not None:
            paths = [sample.path for sample in chosen]
            others[DOMAIN_INPUT] = trained.domain_features(paths, normalized)
        example = (normalized, *others.values())
        with self.step("fold"):
            folded, report = fold_with_report(trained.model, tuple(x[:2] for x in example))
            if others:
                folded.domain_encoder = None
        self.console.print(f"  {report.summary}")
        expected = _outputs(trained.model, example, batch=8)
        return _Material(
            trained, samples, chosen, graph_input, pixels, others, example, expected, folded, report
        )

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        with self.console.status(f"{what} …"):
            yield
        self.console.print(f"[green]✓[/] {what}")


@dataclass(frozen=True)
class _Material:
    """What an export works with.

    Attributes:
        trained: the model before folding, and what is known of it.
        samples, chosen: all images that may be used, and those of the gate.
        graph_input: what the files take.
        pixels: of the chosen images.
        others: further inputs of the model, by name.
        example: all its inputs, the normalised images first.
        expected: its outputs for them [samples, outputs].
        folded, fold_report: what folding made.
    """

    trained: Trained
    samples: Samples
    chosen: list[Sample]
    graph_input: GraphInput
    pixels: Pixels
    others: dict[str, Tensor]
    example: tuple[Tensor, ...]
    expected: np.ndarray
    folded: nn.Module
    fold_report: FoldReport

    @property
    def classes(self) -> bool:
        return bool(self.trained.labels)

    @property
    def inputs(self) -> Inputs:
        """What the files take, for the chosen images."""
        others = {name: x.numpy() for name, x in self.others.items()}
        return {NAME: self.graph_input.array(self.pixels.given.numpy()), **others}

    def write_onnx(self, module: nn.Module, path: Path, **options: Any) -> dict[str, Any]:
        """:func:`export_onnx` of a module that takes and gives what ``folded`` does."""
        return export_onnx(
            module,
            path,
            input_size=self.trained.preprocess.input_size,
            other_inputs={name: tuple(x.shape[1:]) for name, x in self.others.items()},
            graph_input=self.graph_input,
            labels=self.trained.labels,
            metadata=_metadata(self.trained, self.graph_input),
            **options,
        )


def _gate(file: Path, material: _Material) -> list[Parity]:
    """Unfolded against folded, folded against ONNX Runtime, and the first against the last."""
    expected, classes, example = material.expected, material.classes, material.example
    parities = [_resizing(material)] if material.graph_input.resize else []
    for batch in BATCHES:
        outputs = _outputs(material.folded, example, batch)
        parities.append(compare(expected, outputs, stage="folding", batch=batch, classes=classes))
    references = {"ONNX Runtime": outputs, END_TO_END: expected}
    try:
        session = onnx_session(file)
    except InputError as error:
        return [*parities, Parity("ONNX Runtime", 0, len(expected), problems=(str(error),))]
    return parities + compare_onnx(session, material.inputs, references, classes)


def _resizing(material: _Material) -> Parity:
    """What the graph's way of resizing changes, beside the training's."""
    trained, expected = material.trained, material.expected
    normalized = trained.preprocess.normalize(material.pixels.training)
    training = _outputs(trained.model, (normalized, *material.example[1:]), batch=8)
    return compare(
        training,
        expected,
        stage="resizing",
        batch=len(expected),
        classes=material.classes,
        thresholds=RESIZED,
    )


def _failed_onnx(folder: Path, problems: list[str]) -> Artefact:
    """The fp32 file of a bundle that the gate rejected."""
    files = tuple(sorted(file.name for file in folder.glob(f"{MODEL}*")))
    return Artefact("onnx", MODEL, "fp32", FAILED, reason=problems[0], files=files)


def _engine_source(
    folder: Path, material: _Material, parities: list[Parity], speed: bool
) -> EngineSource:
    """What engines are made from."""
    return EngineSource(
        folder=folder,
        onnx=folder / MODEL,
        onnx_parity=[parity for parity in parities if parity.stage == END_TO_END],
        folded=material.folded,
        example=tuple(x[:1] for x in material.example),
        inputs=material.inputs,
        expected=material.expected,
        exact=lambda: _outputs_fp64(material.trained.model, material.example),
        classes=material.classes,
        write_onnx=material.write_onnx,
        deployed=lambda module: Deployed(module, material.graph_input),
        images=lambda: _int8_images(material),
        speed=speed,
    )


def _check_int8(trained: Trained, samples: Samples) -> None:
    """Raises InputError if there is nothing to calibrate INT8 with, or to judge it by."""
    if not samples.calibration or not samples.validation:
        raise InputError(
            "--int8 is calibrated and judged on image files: give a folder of them with --images"
        )
    if not trained.labels:
        raise InputError("--int8 is judged by its accuracy, and this model has no classes")
    if trained.domain_features is not None:
        raise InputError("--int8 is for graphs that take images alone: leave out --domain-input")


def _int8_images(material: _Material) -> Images:
    """What INT8 is calibrated with, and judged by."""
    labels, validation = material.trained.labels, material.samples.validation
    known = all(sample.label in labels for sample in validation)
    preprocess = material.trained.preprocess

    def read(paths: Sequence[Path]) -> np.ndarray:
        pixels = torch.stack([preprocess.read(path) for path in paths])
        return material.graph_input.array(pixels.numpy())

    return Images(
        [sample.path for sample in material.samples.calibration],
        [sample.path for sample in validation],
        np.array([labels.index(sample.label) for sample in validation]) if known else None,
        read,
    )


def _metadata(trained: Trained, graph_input: GraphInput) -> dict[str, Any]:
    hashes = {"run_sha256": "config_sha256", "adapter_sha256": "adapter_sha256"}
    return {
        "preprocessing": graph_input.to_dict(),
        "fastadapt": __version__,
        "backbone": trained.backbone,
        **{key: trained.source[name] for key, name in hashes.items() if name in trained.source},
    }


def _write_golden(path: Path, material: _Material) -> None:
    """What the model gets (images in uint8), and what the trained model says to it."""
    names = [sample.path.name for sample in material.chosen]
    labels = [sample.label for sample in material.chosen]
    expected = torch.from_numpy(material.expected)
    tensors = {NAME: material.pixels.given, **material.others, "expected": expected}
    metadata = {"files": names, "labels": labels}
    write_tensors(
        path, tensors, {k: json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}
    )


@torch.no_grad()
def _outputs(
    model: nn.Module, inputs: tuple[Tensor, ...], batch: int, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    batches = zip(*(x.split(batch) for x in inputs), strict=True)
    parts = [model(*part).flatten(1) for part in batches]
    return torch.cat(parts).to(dtype).numpy()


def _outputs_fp64(model: nn.Module, inputs: tuple[Tensor, ...]) -> np.ndarray:
    """What the model would say without its own rounding."""
    exact = copy.deepcopy(model).double()
    return _outputs(exact, tuple(x.double() for x in inputs), batch=8, dtype=torch.float64)


def _file_table(out: Path, manifest: dict[str, Any]) -> Table:
    table = Table(title=f"bundle {escape(str(out))}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("file")
    table.add_column("MB", justify="right")
    for name in (*manifest["files"], MANIFEST):
        table.add_row(name, f"{(out / name).stat().st_size / 1e6:.2f}")
    return table


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
