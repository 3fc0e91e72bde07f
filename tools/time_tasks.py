"""Time one pass of a graph with one, two and five tasks beside as many graphs of one task.

    python tools/time_tasks.py [--backbone NAME ...] [--out FILE]

Runs are made with weights drawn at random, which take as long as others, and the adapter that
``fastadapt train`` adds. The graphs are those that ``fastadapt export`` writes; ONNX Runtime runs
them in turns with one thread, and the least CPU time of each counts, so that other programs on the
machine lengthen it least.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export.backends.onnx import export_onnx
from fastadapt.export.bundle.task_runs import load_tasks
from fastadapt.export.bundle.trained import load_run, read_run
from fastadapt.export.graph_input import GraphInput
from fastadapt.export.runtimes import Runtime, load_runtime
from fastadapt.files import write_json

TASKS = (1, 2, 5)
CLASSES = 4
BATCHES = (1, 8)
ROUNDS = 10


def main() -> None:
    """Make the graphs, time them, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    backbones = ["tf_efficientnet_lite0", "vit_tiny_patch16_224"]
    parser.add_argument("--backbone", nargs="+", default=backbones)
    parser.add_argument("--out", type=Path, help="a JSON file of the results")
    asked = parser.parse_args()
    rows = []
    for name in asked.backbone:
        with tempfile.TemporaryDirectory() as folder:
            rows += _time(name, Path(folder))
    for row in rows:
        print(
            f"{row['backbone']}, {row['tasks']} tasks, batch {row['batch']}: "
            f"{row['milliseconds']:.2f} ms, {row['megabytes']:.1f} MB"
        )
    if asked.out is not None:
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        machine = {"threads": 1, "machine": platform.machine(), "versions": versions}
        write_json(asked.out, {"command": "python tools/time_tasks.py", **machine, "rows": rows})


def _time(backbone: str, folder: Path) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    weights = folder / "weights.pth"
    torch.save(timm.create_model(backbone, num_classes=0).state_dict(), weights)
    config = fa.AdaptConfig(rank=64, mlp_ratio=0.25)
    runs = {f"task{index}": folder / f"task{index}" for index in range(max(TASKS))}
    for run in runs.values():
        model = fa.adapt(backbone, config, CLASSES, weights=str(weights))
        preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg)
        labels = [str(index) for index in range(CLASSES)]
        fa.save_adapter(model, run, labels=labels, preprocess=preprocess.to_dict())
    graph_input, files = GraphInput(preprocess), {}
    for count in TASKS:
        files[count] = folder / f"{count}.onnx"
        first = dict(list(runs.items())[:count])
        trained = (
            load_run(folder / "task0", read_run(folder / "task0"))
            if count == 1
            else load_tasks(first)
        )
        export_onnx(
            fa.fold(trained.model),
            files[count],
            input_size=preprocess.input_size,
            graph_input=graph_input,
            outputs=() if count == 1 else list(first),
        )
    return _measured(backbone, files, graph_input)


def _measured(
    backbone: str, files: dict[int, Path], graph_input: GraphInput
) -> list[dict[str, Any]]:
    runtimes = {count: load_runtime(file, device="cpu", threads=1) for count, file in files.items()}
    rows = []
    for batch in BATCHES:
        shape = (batch, *graph_input.preprocess.input_size)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        images = graph_input.array(pixels)
        best = dict.fromkeys(runtimes, float("inf"))
        for _ in range(ROUNDS):
            for count, runtime in runtimes.items():
                best[count] = min(best[count], _seconds(runtime, images))
        rows += [
            {
                "backbone": backbone,
                "tasks": count,
                "batch": batch,
                "milliseconds": 1000 * best[count],
                "megabytes": files[count].stat().st_size / 1e6,
            }
            for count in files
        ]
    return rows


def _seconds(runtime: Runtime, images: np.ndarray) -> float:
    began = time.thread_time()
    runtime.outputs(images)
    return time.thread_time() - began


if __name__ == "__main__":
    main()
