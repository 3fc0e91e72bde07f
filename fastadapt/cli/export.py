"""The commands ``fastadapt export`` and ``fastadapt verify``: their options, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

MODEL, COMPARISON, INPUT, BUNDLE = "Model", "Comparison", "The graph's input", "Bundle"
ENGINES = "Engines"
GDPL = "GDPL runs"


def export(
    run: Annotated[
        Path | None,
        typer.Argument(help="A training run's folder; or give --backbone.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The bundle's folder; RUN/bundle if not given.", rich_help_panel=BUNDLE),
    ] = None,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx", help="Export to ONNX; every bundle holds it.", rich_help_panel=BUNDLE
        ),
    ] = True,
    trt: Annotated[
        bool,
        typer.Option(
            "--trt", help="Build a TensorRT or TensorRT-RTX engine.", rich_help_panel=ENGINES
        ),
    ] = False,
    aoti: Annotated[
        bool,
        typer.Option("--aoti", help="Compile with AOTInductor (.pt2).", rich_help_panel=ENGINES),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Quantise to INT8; kept only if it is accurate and faster.",
            rich_help_panel=ENGINES,
        ),
    ] = False,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8",
            help="With --aoti --precision bf16: a .pt2 in FP8, too; kept only if it is accurate "
            "and faster.",
            rich_help_panel=ENGINES,
        ),
    ] = False,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"],
        typer.Option(
            help="Of the engines; layers that need fp32 keep it.", rich_help_panel=ENGINES
        ),
    ] = "fp32",
    batch: Annotated[
        str,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Batch sizes that engines are built and compared for.",
            rich_help_panel=ENGINES,
        ),
    ] = "1:8:32",
    target: Annotated[
        str,
        typer.Option(
            metavar="sm_XX,…",
            help="GPUs that TensorRT-RTX builds for; none need be here.",
            rich_help_panel=ENGINES,
        ),
    ] = "",
    workspace: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most MiB that a layer of TensorRT may use.", rich_help_panel=ENGINES
        ),
    ] = None,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="TensorRT: for all GPUs from Ampere on, at some cost of speed.",
            rich_help_panel=ENGINES,
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="TensorRT: for later versions of it, too.",
            rich_help_panel=ENGINES,
        ),
    ] = False,
    int8_budget: Annotated[
        float,
        typer.Option(help="Accuracy that INT8 may lose, as a share.", rich_help_panel=ENGINES),
    ] = 0.01,
    fp8_budget: Annotated[
        float,
        typer.Option(help="Accuracy that FP8 may lose, as a share.", rich_help_panel=ENGINES),
    ] = 0.01,
    triton_repo: Annotated[
        Path | None,
        typer.Option(
            help="Add the model to this model repository of NVIDIA Triton Inference Server.",
            rich_help_panel=BUNDLE,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle.", rich_help_panel=BUNDLE)
    ] = False,
    speed: Annotated[
        bool, typer.Option(help="Measure images per second.", rich_help_panel=BUNDLE)
    ] = True,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="timm's name, for a model without a run: with --checkpoint, --peft, or timm's "
            "own weights.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights of the fine-tuned model, a state dict.", rich_help_panel=MODEL),
    ] = None,
    checkpoint_key: Annotated[
        str | None,
        typer.Option(
            help="Which state dict of the checkpoint, where it holds several (an EMA beside the "
            "raw weights).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    features: Annotated[
        bool,
        typer.Option(
            "--features",
            help="With --backbone: export features, and leave a classifier out.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    peft: Annotated[
        Path | None,
        typer.Option(help="A folder that PEFT wrote: a LoRA to merge.", rich_help_panel=MODEL),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="The backbone's weights, if they are not where training found them, or not "
            "timm's.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --backbone: pixels, if not timm's size.", rich_help_panel=MODEL
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="A file of class names, one a line: other classes of a GDPL run, or the names of "
            "a model given by --backbone.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images to compare on, instead of the validation split. Without a "
            "run, synthetic ones if not given.",
            rich_help_panel=COMPARISON,
        ),
    ] = None,
    input: Annotated[
        Literal["uint8", "float"],
        typer.Option(
            help="uint8: batch × H × W × 3, as decoded; float: batch × 3 × H × W, from 0 to 1.",
            rich_help_panel=INPUT,
        ),
    ] = "uint8",
    resize: Annotated[
        bool,
        typer.Option(
            "--resize",
            help="Resize and crop inside the graph, too: images of any size.",
            rich_help_panel=INPUT,
        ),
    ] = False,
    normalize: Annotated[
        bool, typer.Option(help="Normalise inside the graph.", rich_help_panel=INPUT)
    ] = True,
    domain_input: Annotated[
        bool,
        typer.Option(
            "--domain-input",
            help="The graph takes domain features as a second input, its encoder is left out.",
            rich_help_panel=GDPL,
        ),
    ] = False,
    domain_weights: Annotated[
        str | None,
        typer.Option(help="The domain encoder's weights, if they moved.", rich_help_panel=GDPL),
    ] = None,
    domain_features: Annotated[
        Path | None,
        typer.Option(
            help="The images' features, for runs that have no domain encoder.", rich_help_panel=GDPL
        ),
    ] = None,
) -> None:
    """Fold a trained model, export it, and compare: the bundle is written only if they agree."""
    from rich.console import Console

    from fastadapt.errors import InputError
    from fastadapt.export import export_run, export_timm
    from fastadapt.export.artefact import Batches
    from fastadapt.export.bundle.engine_options import EngineOptions
    from fastadapt.export.triton_server import check_repository, write_repository
    from fastadapt.files import read_lines

    if (run is None) == (backbone is None):
        raise InputError("give a run's folder, or a model with --backbone: one of the two")
    if out is None and run is None:
        raise InputError("--backbone needs --out, the bundle's folder")
    out = out or run / "bundle"
    if triton_repo is not None:
        check_repository(triton_repo, out, overwrite)
    engines = EngineOptions(
        trt=trt,
        aoti=aoti,
        int8=int8,
        fp8=fp8,
        precision=precision,
        batch=Batches.parse(batch),
        targets=tuple(part.strip() for part in target.split(",") if part.strip()),
        workspace=workspace,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        int8_budget=int8_budget,
        fp8_budget=fp8_budget,
    )
    names = None if classes is None else read_lines(classes)
    console = Console(highlight=False)
    shared = {
        "weights": weights,
        "images": images,
        "class_names": names,
        "input": input,
        "resize": resize,
        "normalize": normalize,
        "overwrite": overwrite,
        "speed": speed,
        "engines": engines,
        "console": console,
    }
    domain = {
        "domain_input": domain_input,
        "domain_features": domain_features,
        "domain_weights": domain_weights,
    }
    if run is not None:
        for option, value in (
            ("--checkpoint", checkpoint),
            ("--peft", peft),
            ("--image-size", image_size),
            ("--checkpoint-key", checkpoint_key),
            ("--features", features or None),
        ):
            if value is not None:
                raise InputError(f"{option} is for models that --backbone names, not for runs")
        export_run(run, out, **domain, **shared)
    else:
        if any(domain.values()):
            raise InputError("--domain-input, --domain-features and --domain-weights are for runs")
        export_timm(
            backbone,
            out,
            checkpoint=checkpoint,
            peft=peft,
            image_size=image_size,
            checkpoint_key=checkpoint_key,
            features=features,
            **shared,
        )
    if triton_repo is not None:
        model = write_repository(out, triton_repo, overwrite=overwrite)
        console.print(f"[green]✓[/] Triton model repository: {model}", soft_wrap=True)


def verify(
    bundle: Annotated[Path, typer.Argument(help="What fastadapt export wrote.")],
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Build engines that cannot run here anew, for this machine."
        ),
    ] = False,
    speed: Annotated[bool, typer.Option(help="Measure images per second.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a bundle's files and repeat the comparison on its golden samples, here."""
    import json as json_format

    from rich.console import Console

    from fastadapt.export.bundle.verify import artefact_table, speed_table, verify_bundle
    from fastadapt.export.parity import GateError, parity_table

    console = Console(highlight=False, quiet=json)
    with console.status(f"verify {bundle} …"):
        result = verify_bundle(bundle, speed=speed, rebuild=rebuild, console=console)
    if json:
        print(json_format.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    console.print(f"[green]✓[/] {len(result.manifest['files'])} files are whole")
    for note in result.notes:
        console.print(f"  {note}")
    console.print(artefact_table(result.artefacts))
    for artefact in result.artefacts:
        if artefact.parity:
            console.print(parity_table(artefact.parity, artefact.path))
    if not result.passed:
        raise GateError(f"{bundle} does not run here as it did before: {result.problems[0]}")
    if result.images_per_second:
        console.print(speed_table(result.artefacts))
