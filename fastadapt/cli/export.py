"""The commands ``fastadapt export`` and ``fastadapt verify``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadapt.cli.options import Given, command, with_flags
from fastadapt.errors import InputError
from fastadapt.export.settings import (
    BundleSettings,
    EngineSettings,
    ModelSettings,
    TargetSettings,
    VerifySettings,
)
from fastadapt.interrupt import working
from fastadapt.written_folders import is_bundle

OF_A_NAMED_MODEL = ("checkpoint", "peft", "image_size", "checkpoint_key", "features")
OF_A_RUN = ("domain_input", "domain_features", "domain_weights")


@command(ModelSettings, TargetSettings, BundleSettings, EngineSettings)
def export(given: Given) -> None:
    """Fold a trained model, export it, and compare: the bundle is written only if they agree."""
    model, target = given.build(ModelSettings), given.build(TargetSettings)
    settings = given.build(BundleSettings)
    engines = given.fields(EngineSettings)
    out = _target(given, model, target)

    from rich.console import Console
    from rich.markup import escape

    from fastadapt.export import EngineOptions, export_run, export_tasks, export_timm
    from fastadapt.export.triton_server import check_repository, write_repository
    from fastadapt.files import read_lines

    console = Console(highlight=False, quiet=target.json)
    shared: dict[str, Any] = {
        "weights": model.weights,
        "images": target.images,
        "class_names": None if model.class_names is None else read_lines(model.class_names),
        **settings.to_dict(),
        "engines": EngineOptions(**engines),
        "console": console,
    }
    with working():
        if target.repository is not None:
            check_repository(target.repository, out)
        if len(model.runs) > 1:
            del shared["class_names"]
            result = export_tasks(model.runs, out, tasks=model.tasks or None, **shared)
        elif model.runs:
            domain = {name: getattr(model, name) for name in OF_A_RUN}
            result = export_run(model.runs[0], out, **domain, **shared)
        else:
            named = {name: getattr(model, name) for name in OF_A_NAMED_MODEL}
            result = export_timm(str(model.backbone), out, **named, **shared)
        written = None
        if target.repository is not None:
            written = write_repository(
                out,
                target.repository,
                backend=target.triton_backend,
                overwrite=settings.overwrite,
            )
            console.print(
                f"[green]✓[/] Triton model repository: {escape(str(written))}", soft_wrap=True
            )
    if target.json:
        where = {"bundle": str(out), "triton_model": None if written is None else str(written)}
        _print_json({**where, "manifest": result.manifest})


def _target(given: Given, model: ModelSettings, target: TargetSettings) -> Path:
    """Return the bundle's folder; refuse options that are missing or exclude each other."""
    if bool(model.runs) == (model.backbone is not None):
        raise InputError("give a run's folder, or a model with --backbone: one of the two")
    if model.tasks and len(model.runs) < 2:
        raise InputError("--task names the tasks of several runs: give two runs or more")
    if not model.runs:
        if target.out is None:
            raise InputError("--backbone needs --out, the bundle's folder")
        if any(given.values[name] for name in OF_A_RUN):
            raise InputError("--domain-input, --domain-features and --domain-weights are for runs")
        return target.out
    for name in OF_A_NAMED_MODEL:
        if given.values[name] not in (None, False):
            raise InputError(
                f"{given.flag(name)} is for models that --backbone names, not for runs"
            )
    if len(model.runs) > 1:
        if target.out is None:
            raise InputError("several runs need --out, the bundle's folder")
        for name in (*OF_A_RUN, "classes"):
            if given.values[name] not in (None, False):
                raise InputError(f"{given.flag(name)} is for one GDPL run, not for several runs")
        return target.out
    if target.out is None and is_bundle(model.runs[0]):
        from fastadapt.train.run_folder import check_finished

        check_finished(model.runs[0])  # rather than that no bundle goes into this one
    return target.out or model.runs[0] / "bundle"


@command(VerifySettings)
def verify(given: Given) -> None:
    """Check a bundle's files and repeat the comparison on its golden samples, here."""
    settings = given.build(VerifySettings)

    from rich.console import Console
    from rich.markup import escape

    from fastadapt.export.bundle.measured import MEASURED
    from fastadapt.export.bundle.verify import artefact_table, speed_table, verify_bundle
    from fastadapt.export.parity import GateError, parity_table

    console = Console(highlight=False, quiet=settings.json)
    with working(), console.status(f"verify {escape(str(settings.bundle))} …"):
        result = verify_bundle(
            settings.bundle,
            speed=settings.speed,
            rebuild=settings.rebuild,
            measure=settings.measure,
            trust=settings.trust,
            key=settings.key,
            console=console,
        )
    said = (replace(a, reason=with_flags(a.reason, given.options)) for a in result.artefacts)
    result = replace(result, artefacts=tuple(said))
    if settings.json:
        _print_json(result.to_dict())
    signed = "" if settings.key is None else f", and signed with {escape(str(settings.key))}"
    console.print(f"[green]✓[/] {len(result.manifest['files'])} files are whole{signed}")
    for note in result.notes:
        console.print(f"  {escape(note)}")
    console.print(artefact_table(result.artefacts))
    for artefact in result.artefacts:
        if artefact.parity:
            console.print(parity_table(artefact.parity, artefact.path or artefact.kind))
    if not result.passed:
        raise GateError(
            f"{settings.bundle} does not run here as it did before: {result.problems[0]}"
        )
    if settings.measure:
        console.print(f"[green]✓[/] speeds are kept in {escape(str(settings.bundle / MEASURED))}")
    if result.images_per_second:
        console.print(speed_table(result.artefacts))


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))
