"""``fastadapt export``: a trained model to a bundle, which is written only if outputs agree.

1. Load the trained model (``trained``) and choose images (``samples``).
2. Fold it, and export it to ONNX.
3. Compare unfolded, folded and exported model (``gate``).
4. Build the other files that were asked for (``build``), and compare each (``verify_artefact``).
5. Write the manifest, the golden samples and the report.

Everything is made in a temporary folder beside the target and renamed at the end (``staging``). A
bundle whose outputs differ from the trained model's is kept as ``BUNDLE.rejected``, with the
reasons in its manifest, and what was at ``BUNDLE`` stays as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from fastadapt.errors import InputError, counted, form
from fastadapt.files import seal, write_json, write_text
from fastadapt.gdpl.model import GDPLModel
from fastadapt.locks import lock_beside
from fastadapt.output_place import check_output
from fastadapt.settings import Setting

from ..artefact import FAILED, Artefact
from ..features import Features, check_features
from ..fold import FoldReport, fold_with_report
from ..graph_input import Deployed, GraphInput, check_settings
from ..parity import GateError, Parity, check_problems, parity_table
from ..settings import BundleSettings
from ..tasks import check_names
from .build import build_artefacts
from .consistency import check_labels
from .engine_options import EngineOptions
from .folded_model import FoldedModel
from .gate import BATCHES, END_TO_END, gate, model_outputs, model_outputs_fp64
from .golden import GoldenSamples, write_golden
from .manifest import GOLDEN, MANIFEST, MODEL, REPORT, list_files
from .material import Material, ModelInputs, check_quantization
from .record import Checked, describe, labels_of
from .report import render_report
from .samples import (
    GOLDEN_SAMPLES,
    Samples,
    choose,
    folder_samples,
    read_pixels,
    run_samples,
    synthetic_samples,
)
from .schema import check_manifest
from .staging import check_target, place, staging
from .task_runs import load_tasks, task_samples
from .trained import Trained, load_run, load_timm, read_run
from .trust import remember_bundle
from .verify_artefact import Reference, artefact_problems

DOMAIN_INPUT = "domain_features"
FEWEST_SAMPLES = max(BATCHES)


@dataclass(frozen=True)
class ExportSettings(BundleSettings):
    """How a bundle is made, of whichever model, with all of its files."""

    engines: Annotated[
        EngineOptions, Setting("The files that are built beside the fp32 ONNX file.")
    ] = field(default_factory=EngineOptions)

    def check(self) -> None:
        """Raise InputError, before any work, for settings that exclude each other or fail."""
        check_settings(self.input, self.normalize, self.resize)
        wanted = self.engines
        others = wanted.trt or wanted.openvino or wanted.aoti or wanted.fused or wanted.int8
        others = others or wanted.executorch or wanted.litert or wanted.fused_attention
        others = others or wanted.coreml
        if self.resize and (others or wanted.precision != "fp32"):
            raise InputError(
                "`resize` is for the fp32 ONNX file alone (TensorRT has no antialiased filter): "
                "leave out `trt`, `openvino`, `executorch`, `litert`, `coreml`, `fused_attention`, "
                "`aoti`, `fused`, `int8`, `fp8` and `precision`, or resize before the graph"
            )
        if wanted.coreml and not self.normalize:
            raise InputError(
                "`coreml` takes the image's own bytes and normalises them: leave out "
                "`normalize=False`"
            )
        if self.with_features and (wanted.trt or wanted.fused or wanted.int8 or wanted.fp8):
            raise InputError(
                "`with_features` is for ONNX files and .pt2 in fp32, fp16 and bf16: leave out "
                "`trt`, `fused`, `int8` and `fp8`"
            )
        wanted.check()


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export_run` and :func:`export_timm` wrote.

    Attributes:
        bundle: the folder.
        manifest: content of its ``manifest.json``.
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
    """Fold a run's model, export it and write a bundle, if the outputs agree.

    Args:
        run: a training run's folder, or what :func:`fastadapt.save_adapter` or
            :func:`fastadapt.gdpl.save_gdpl` wrote.
        out: the bundle's folder.
        weights: a local file of the backbone's (GDPL: the CLIP model's) weights, where the
            recorded one is gone.
        images: a folder of images for the parity check and the golden samples, instead of the
            run's validation split.
        backbone: the pretrained backbone (GDPL: the CLIP model), if it was given as a module.
        class_names: GDPL only: other classes than those it was trained on.
        domain_input: GDPL only: leave the domain encoder out of the graph, which then has the
            features as its second input, ``domain_features`` [batch, D_f]. Always so for models
            without an encoder.
        domain_features: the features of the images that are compared, for such models
            (:class:`fastadapt.gdpl.FeatureTable`).
        domain_weights: GDPL only: a local file of the domain encoder's weights, as ``weights``.
        console: where progress is shown; nowhere if ``None``.
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
    with lock_beside(export.out):
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


def export_tasks(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    weights: str | None = None,
    images: str | Path | None = None,
    backbone: nn.Module | None = None,
    console: Console | None = None,
    **settings: Any,
) -> ExportResult:
    """Export several runs as one graph: their frozen backbone once, and an output for each.

    Args:
        runs: two or more runs, or folders of folds, of one frozen backbone and one preprocessing.
        out: the bundle's folder.
        tasks: names of the runs' tasks, and of the outputs; those of the folders if ``None``.
        weights, images, backbone, console: as for :func:`export_run`.
        **settings: of :class:`ExportSettings`.

    Returns:
        An :class:`ExportResult`.

    Raises:
        GateError: the outputs of a task differ; the bundle is kept as ``out`` + ``.rejected``.
        InputError: two runs differ in what they share, or a run changed its backbone; names of
            tasks are the same; as for :func:`export_run`.
    """
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise InputError(
            f"there {form(len(folders), 'is', 'are')} {counted(len(folders), 'run')}; several "
            "tasks need two or more"
        )
    names = [folder.absolute().name for folder in folders] if tasks is None else list(tasks)
    if len(names) != len(folders):
        raise InputError(
            f"`tasks` names {counted(len(names), 'task')}; there are {counted(len(folders), 'run')}"
        )
    check_names(names)
    named = dict(zip(names, folders, strict=True))
    export = _Export(Path(out), ExportSettings(**settings), console)
    if export.settings.with_features:
        raise InputError(
            "`with_features` is for one model; the adapters of several tasks have features of "
            "their own: export their runs by themselves"
        )
    with lock_beside(export.out):
        with export.step("load the trained models"):
            trained = load_tasks(named, backbone=backbone, weights=weights)
        return export.run(trained, task_samples(named, images, FEWEST_SAMPLES))


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
    checkpoint_key: str | None = None,
    features: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> ExportResult:
    """Export a timm model without a run: as it is, fine-tuned elsewhere, or with a LoRA.

    Args:
        name: timm's name of the model.
        out: the bundle's folder.
        checkpoint: a state dict of the fine-tuned model.
        peft: a folder that PEFT's ``save_pretrained`` wrote.
        weights: a local file of the weights that ``peft`` was trained on.
        image_size: for models that are built for one size.
        class_names: of the outputs; numbers if ``None``.
        checkpoint_key: which state dict of the file is meant, where it holds several.
        features: without a classifier, even if the file holds one.
        images: a folder of images for the parity check and the golden samples. Without one they
            are synthetic, and the manifest says so.
        console: where progress is shown; nowhere if ``None``.
        **settings: of :class:`ExportSettings`.

    Returns:
        An :class:`ExportResult`.

    Raises:
        GateError, InputError: as for :func:`export_run`.
    """
    export = _Export(Path(out), ExportSettings(**settings), console)
    with lock_beside(export.out):
        samples = None if images is None else folder_samples(images, FEWEST_SAMPLES)
        with export.step("load the trained model"):
            trained = load_timm(
                name,
                checkpoint=checkpoint,
                peft=peft,
                weights=weights,
                image_size=image_size,
                class_names=class_names,
                checkpoint_key=checkpoint_key,
                features=features,
                tell=lambda line: export.console.print(f"  {escape(line)}"),
            )
        return export.run(trained, samples or synthetic_samples(trained.preprocess))


class _Export:
    """One export, from a trained model to the bundle at its target.

    The constructor refuses bad settings and targets, before any work.
    """

    def __init__(self, out: Path, settings: ExportSettings, console: Console | None):
        settings.check()
        out = check_output(out, "replaced folder", "a bundle")
        self.out, self.settings = out, settings
        self.rejected = out.with_name(out.name + ".rejected")
        self.console = console or Console(quiet=True)
        check_target(out, settings.overwrite)
        check_target(self.rejected, overwrite=True)

    def run(self, trained: Trained, samples: Samples) -> ExportResult:
        """Fold, export, compare and write; raise GateError if the outputs differ."""
        for labels in labels_of(trained).values():
            check_labels(labels)
        if self.settings.with_features:
            check_features(trained.model, trained.backbone)
            if not trained.labels:
                raise InputError(
                    f"{trained.backbone} has no classes, so that its output is the features: "
                    "leave out `with_features`"
                )
        golden = self._golden(trained, samples)
        material = self._prepare(trained, samples)
        golden = golden or material.golden
        with staging(self.out) as folder:
            with self.step("export to ONNX"):
                opset = self.settings.opset
                described = material.write_onnx(material.folded, folder / MODEL, opset=opset)
            count = len(material.given.chosen)
            with self.step(f"compare on {count} images at batch {_listed(BATCHES)}"):
                parities = gate(folder / MODEL, material)
            self.console.print(parity_table(parities))
            problems = check_problems(parities)
            if problems:
                artefacts = [_failed_onnx(folder, problems)]
            else:
                folded = self._folded_model(folder, material, parities)
                artefacts = build_artefacts(self.settings.engines, folded, self.console)
                problems = artefact_problems(artefacts)
            for name, labels in labels_of(trained).items():
                write_text(folder / name, "".join(f"{label}\n" for label in labels))
            images = write_golden(folder / GOLDEN, golden)
            checked = Checked(tuple(parities), tuple(artefacts), tuple(problems))
            manifest = describe(
                folder, material, self.settings.engines, described, checked, golden, images
            )
            # The report shows every hash but its own, which comes last.
            write_text(folder / REPORT, render_report(manifest, golden))
            manifest["files"] = list_files(folder)
            manifest = seal(manifest)
            write_json(folder / MANIFEST, manifest)
            check_manifest(manifest, str(folder / MANIFEST))
            target = self.rejected if problems else self.out
            check_target(target, overwrite=bool(problems) or self.settings.overwrite)
            place(folder, target)
        remember_bundle(manifest)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise GateError(
                f"the export was rejected: {problems[0]}{more}. It is kept in {self.rejected}"
            )
        self.console.print(_file_table(self.out, manifest))
        return ExportResult(self.out, manifest, material.fold_report, tuple(parities))

    def _golden(self, trained: Trained, samples: Samples) -> GoldenSamples | None:
        """Make golden samples of the images that were named for it; ``None`` if none were."""
        wanted = self.settings.golden
        if wanted is None:
            return None
        if wanted == "synthetic":
            kept = synthetic_samples(trained.preprocess)
        else:
            kept = folder_samples(wanted, FEWEST_SAMPLES, "golden")
        inputs = self._inputs(trained, kept)
        expected = model_outputs(trained.model, inputs.example, batch=8)
        features = self._features(trained, inputs)
        return inputs.golden(expected, kept.origin, features, trained.tasks)

    def _features(self, trained: Trained, inputs: ModelInputs) -> np.ndarray | None:
        """Compute the features before the head, if they are asked for."""
        if not self.settings.with_features:
            return None
        return model_outputs(Features(trained.model), inputs.example, batch=8)

    def _inputs(self, trained: Trained, samples: Samples) -> ModelInputs:
        """Choose samples, read them, and compute the model's other inputs."""
        settings = self.settings
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
        return ModelInputs(chosen, graph_input, pixels, others, (normalized, *others.values()))

    def _prepare(self, trained: Trained, samples: Samples) -> Material:
        """Read the images and fold the model."""
        settings = self.settings
        for flag, wanted in (("`int8`", settings.engines.int8), ("`fp8`", settings.engines.fp8)):
            if wanted:
                check_quantization(flag, trained, samples)
        inputs = self._inputs(trained, samples)
        with self.step("fold"):
            example = tuple(x[:2] for x in inputs.example)
            folded, report = fold_with_report(trained.model, example)
            if inputs.others and isinstance(folded, GDPLModel):
                folded.domain_encoder = None
        self.console.print(f"  {report.summary}", markup=False)
        return Material(
            trained=trained,
            samples=samples,
            given=inputs,
            expected=model_outputs(trained.model, inputs.example, batch=8),
            folded=folded,
            fold_report=report,
            features=self._features(trained, inputs),
        )

    def _folded_model(
        self, folder: Path, material: Material, parities: list[Parity]
    ) -> FoldedModel:
        return FoldedModel(
            folder=folder,
            onnx=folder / MODEL,
            onnx_parity=[parity for parity in parities if parity.stage.startswith(END_TO_END)],
            module=material.folded,
            example=tuple(x[:1] for x in material.given.example),
            reference=Reference(
                material.inputs,
                material.expected,
                material.classes,
                features=material.features,
                tasks=material.trained.tasks,
                exact=lambda: model_outputs_fp64(material.trained.model, material.given.example),
            ),
            write_onnx=material.write_onnx,
            deployed=lambda module: Deployed(module, material.given.graph_input),
            images=material.quantization_images,
            speed=self.settings.speed,
            opset=self.settings.opset,
        )

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show on the console that a step runs, and that it is done."""
        with self.console.status(f"{what} …"):
            yield
        self.console.print(f"[green]✓[/] {what}")


def _failed_onnx(folder: Path, problems: list[str]) -> Artefact:
    files = tuple(sorted(file.name for file in folder.glob(f"{MODEL}*")))
    return Artefact("onnx", MODEL, "fp32", FAILED, reason=problems[0], files=files)


def _file_table(out: Path, manifest: dict[str, Any]) -> Table:
    table = Table(title=f"bundle {escape(str(out))}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("file")
    table.add_column("MB", justify="right")
    for name in (*manifest["files"], MANIFEST):
        table.add_row(name, f"{(out / name).stat().st_size / 1e6:.2f}")
    return table


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
