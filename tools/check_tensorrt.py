"""Try TensorRT on this machine: build, verify, compare and time engines; write one JSON.

    python tools/check_tensorrt.py --out tensorrt-report
    python tools/check_tensorrt.py --out tensorrt-report --images photographs   # INT8 and FP8, too

For each backbone, with random weights, a bundle is exported with an engine in every precision, and
verified. The file ``report.json`` says of every engine whether it
was built, what ran, how far it is from the model, and how fast it is; attach it to an issue.
Needs the extra ``trt`` (or ``trt-rtx``), and a GPU that it serves for more than the builds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch

from fastadapt.errors import InputError, first_line
from fastadapt.export import EngineOptions, export_timm, verify_bundle
from fastadapt.export.settings import Batches
from fastadapt.files import write_json
from fastadapt.info import environment, gpus

BACKBONES = ("vit_small_patch16_224", "convnext_tiny", "efficientnet_lite0")
PRECISIONS = ("fp32", "fp16", "bf16")


def main(arguments: list[str] | None = None) -> int:
    """Check every backbone and precision; return 0 if all that was tried is verified."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="timm's names")
    parser.add_argument("--images", type=Path, help="folder of class folders, for INT8 and FP8")
    parser.add_argument("--target", default="", help="GPUs that TensorRT-RTX builds for")
    parser.add_argument("--batch", default="1:8:32", help="MIN:OPT:MAX")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    given = parser.parse_args(arguments)
    rows = []
    for backbone in given.backbones.split(","):
        for precision in given.precisions.split(","):
            rows.append(_check(backbone, precision, given))
            print(f"{backbone}, {precision}: {rows[-1]['outcome']}", flush=True)
    report = {"environment": {**environment(), "gpus": gpus()}, "engines": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "report.json", report)
    print(f"wrote {given.out / 'report.json'}")
    return 0 if all(row["outcome"] == "verified" for row in rows) else 1


def _check(backbone: str, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    """Export one backbone in one precision; with images, in INT8 and FP8 beside it."""
    row: dict[str, Any] = {"backbone": backbone, "precision": precision}
    classes = sorted(p.name for p in given.images.iterdir() if p.is_dir()) if given.images else []
    eight_bit = bool(classes) and precision == "fp16"
    torch.manual_seed(0)
    try:
        options = EngineOptions(
            trt=True,
            precision=precision,
            int8=eight_bit,
            fp8=eight_bit,
            batch=Batches.parse(given.batch),
            targets=tuple(filter(None, given.target.split(","))),
        )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = timm.create_model(backbone, num_classes=len(classes))
            torch.save(model.state_dict(), folder / "model.pth")
            export_timm(
                backbone,
                folder / "bundle",
                checkpoint=folder / "model.pth",
                features=not classes,
                images=given.images,
                class_names=classes or None,
                engines=options,
            )
            result = verify_bundle(folder / "bundle")
            row["artefacts"] = [artefact.to_dict() for artefact in result.artefacts]
    except InputError as error:
        return {**row, "outcome": f"failed: {first_line(error)}"}
    engines = [a for a in row["artefacts"] if a["kind"].startswith("tensorrt")]
    states = {engine["status"] for engine in engines}
    return {**row, "outcome": states.pop() if len(states) == 1 else ", ".join(sorted(states))}


if __name__ == "__main__":
    sys.exit(main())
