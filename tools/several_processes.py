"""Train in 1, 2, 4 and 8 processes on this machine's CPUs, and compare what they give.

    python tools/several_processes.py [--out bench/results/processes.json] [--sizes 2,4,8]

For a ViT (cached, then all trains) and a network with batch norms (nothing cached): the difference
of all weights from those of one process, whether the images of each batch are the same, and the
difference after a run that was stopped and resumed with another number of processes. Takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file

import fastadapt as fa
from fastadapt import processes
from fastadapt.data import images, scan
from fastadapt.data.images import ImageSource
from fastadapt.files import write_json
from fastadapt.info import versions
from fastadapt.processes import place_from_environment
from fastadapt.train.config import TrainConfig
from fastadapt.train.loop import Trainer
from fastadapt.train.run import train
from fastadapt.train.sources import FeatureSource
from tests.helpers.imagesets import make_folders
from tests.helpers.processes import run_processes

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=1.0, input_size=(3, 32, 32))
COMMON = {"lr": 1e-3, "lr2": 1e-4, "val_fraction": 0.25, "probe": False, "batch_size": 19}
CASES = {
    "ViT, cached, then all trains": ("test_vit", {"stages": 2, "epochs": 2, "epochs2": 2}),
    "convolutions with batch norms, nothing cached": (
        "test_efficientnet",
        {"stages": 2, "epochs": 1, "epochs2": 2, "cache": False, "augment": "dihedral"},
    ),
}


def run(data: Path, backbone: str, config: TrainConfig, out: Path, stop: int = 0) -> None:
    """Train in this process of several; note the order of images; stop after some epochs."""
    torch.set_num_threads(1)
    processes.HESITATION = 0.0
    complete = Trainer._complete_epoch
    epoch = Trainer._train_epoch
    rank = place_from_environment().rank
    orders: list[list[int]] = []

    def noted(kind):
        batches = kind.batches

        def call(self, order, views, batch_size):
            if views is not None and Trainer.noting:
                orders.append([int(place) for place in order])
            return batches(self, order, views, batch_size)

        kind.batches = call
        return batches

    def train_epoch(self, *arguments):
        Trainer.noting = True
        row = epoch(self, *arguments)
        Trainer.noting = False
        return row

    def then_stop(self, row, optimizer):
        complete(self, row, optimizer)
        if len(self.state.history) == stop and rank == self.processes.place.size - 1:
            signal.raise_signal(signal.SIGINT)

    Trainer.noting = False
    originals = [(kind, noted(kind)) for kind in (FeatureSource, ImageSource)]
    Trainer._train_epoch, Trainer._complete_epoch = train_epoch, then_stop
    try:
        resume = (out / "state.safetensors").is_file()
        options = {"pretrained": False, "workers": 1, "save_every": 0, "resume": resume}
        train(data, out, backbone, config, ADAPT, **options)
    except KeyboardInterrupt:
        if place_from_environment().size > 1:
            raise SystemExit(130) from None
    finally:
        Trainer._train_epoch, Trainer._complete_epoch = epoch, complete
        for kind, batches in originals:
            kind.batches = batches
    Path(f"{out}-order-{rank}.json").write_text(json.dumps(orders))


def batches_of(out: Path, size: int, batch_size: int) -> list[list[int]]:
    """Return the images of each batch, from the orders that the processes noted."""
    parts = [json.loads(Path(f"{out}-order-{rank}.json").read_text()) for rank in range(size)]
    found = []
    for epoch in zip(*parts, strict=True):
        counts = batch_size // size + (np.arange(size) < batch_size % size)
        starts = [0] * size
        while starts[0] < len(epoch[0]):
            batch: list[int] = []
            for rank, order in enumerate(epoch):
                batch += order[starts[rank] : starts[rank] + counts[rank]]
                starts[rank] += int(counts[rank])
            found.append(list(dict.fromkeys(batch)))  # less the images that do not count
    return found


def difference(one: Path, other: Path) -> float:
    """Return the relative difference of all weights of two runs."""
    a, b = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    a, b = (torch.cat([t.double().flatten() for t in tensors.values()]) for tensors in (a, b))
    return float((a - b).norm() / a.norm())


def main() -> None:
    """Run all cases; write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/processes.json"))
    parser.add_argument("--sizes", default="2,4,8")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    images.INLINE = scan.INLINE = 1  # few images, and yet decoded in shares
    folder = Path(tempfile.mkdtemp())
    data = make_folders(folder / "data", 16)
    results = {}
    for case, (backbone, settings) in CASES.items():
        config = TrainConfig(**COMMON, **settings)
        one = folder / "one"
        run(data, backbone, config, one)
        rows = {}
        for size in sizes:
            out = folder / f"processes-{size}"
            codes = run_processes(size, partial(run, data, backbone, config, out))
            assert codes == [0] * size, codes
            order = batches_of(out, size, config.batch_size)
            broken = folder / f"resumed-{size}"
            codes = run_processes(size, partial(run, data, backbone, config, broken, 2))
            assert codes == [130] * size, codes
            half = size // 2
            codes = run_processes(half, partial(run, data, backbone, config, broken))
            assert codes == [0] * half, codes
            rows[size] = {
                "difference of weights": difference(one, out),
                "same images in each batch": order == batches_of(one, 1, config.batch_size),
                f"difference, stopped and resumed with {half}": difference(one, broken),
            }
            print(case, size, rows[size], flush=True)
        results[case] = rows
        for path in folder.glob("*"):
            if path.is_dir() and path != data:
                shutil.rmtree(path)
    known = {name: versions()[name] for name in ("python", "fastadapt", "torch")}
    commit = os.environ.get("FASTADAPT_COMMIT")
    about = {"versions": known, **({"commit": commit} if commit else {})}
    write_json(arguments.out, {"about": about, "processes": results})
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
