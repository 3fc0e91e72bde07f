"""Send a million paths through prediction, kill it at random points, and compare the results.

Decoder and model are stubs that make numbers of a path's name, so that listing, parts, memory and
`--resume` are what is tested. For example:

    python tools/million_paths.py --json bench/results/million-paths.json

1. A list of COUNT paths is predicted by one process; its rows and its peak memory are kept.
2. The same is done by processes that get SIGKILL when a random number of parts is finished, KILLS
   times; the process after each goes on with `--resume`.
3. Both files must be the same, byte for byte, with each path once; memory must not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastadapt.decision import LIKELIEST, Decision
from fastadapt.export.predict.columns import PredictionColumns
from fastadapt.export.predict.decode_ahead import DecodedBatch
from fastadapt.export.predict.job import Job
from fastadapt.export.predict.settings import WorkSettings
from fastadapt.export.predict.sources import ImageList
from fastadapt.files import write_json

CLASSES = ("crack", "good", "dirt")
BATCH = 256
FEW = 10_000  # paths of the run that memory is compared with


def stub_decoder(reading: Any, value_range: Any, batch: int, workers: int) -> Any:
    """Make one pixel of each path, its number; every 1,000th file cannot be read."""

    def decode(batches):
        for paths in batches:
            numbers = np.array([int(Path(path).stem) for path in paths], np.int64)
            bad = {i: f"{paths[i]} is bad" for i in np.flatnonzero(numbers % 1000 == 999).tolist()}
            rows = [i for i in range(len(paths)) if i not in bad]
            yield DecodedBatch([(rows, numbers[rows].reshape(-1, 1, 1, 1))], bad)

    return nullcontext(decode)


@dataclass(frozen=True)
class StubModel:
    """What a job reads of a model; its outputs are sines of a path's number."""

    width: int = len(CLASSES)
    classes: tuple[str, ...] = CLASSES
    tasks: tuple[()] = ()
    reading: None = None
    value_range: None = None
    name: str = "a stub"
    decision: Decision = LIKELIEST
    identity: dict[str, Any] = field(default_factory=lambda: {"hash": "1"})

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Compute outputs [images, classes]."""
        return np.sin(pixels.reshape(-1, 1) * np.arange(1, self.width + 1)).astype(np.float32)


def predict(list_of_paths: Path, out: Path) -> None:
    """Predict a list, going on from what is finished, and print the peak memory in MiB."""
    model: Any = StubModel()
    work = WorkSettings(images=(str(list_of_paths),), out=out, batch=BATCH, quiet=True, resume=True)
    images = ImageList(work.images)
    Job(model, images, PredictionColumns(model), work, {}, stub_decoder).run()
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    print(int(peak.split()[1]) / 1024)


def write_list(path: Path, count: int) -> None:
    """Write a list of paths that do not exist."""
    with path.open("w") as file:
        file.writelines(f"{index // 1000:05}/{index:09}.jpg\n" for index in range(count))


def start(list_of_paths: Path, out: Path) -> subprocess.Popen[str]:
    """Start a process that predicts."""
    arguments = [sys.executable, __file__, "--worker", str(list_of_paths), str(out)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def whole(list_of_paths: Path, out: Path) -> tuple[float, float]:
    """Predict without a stop; return the peak memory in MiB and the seconds."""
    began = time.perf_counter()
    process = start(list_of_paths, out)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run without a stop ended with {process.returncode}")
    return float(said), time.perf_counter() - began


def killed(list_of_paths: Path, out: Path, points: list[int]) -> list[int]:
    """Predict with a SIGKILL at each point; return the numbers of parts that were finished then.

    Args:
        list_of_paths: the images.
        out: the results.
        points: numbers of finished parts, ascending.
    """
    folder = out.with_name(f"{out.name}.parts")
    found = []
    for point in points:
        process = start(list_of_paths, out)
        record = folder / f"part-{point:06}.json"
        while process.poll() is None and not record.is_file():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append(len(list(folder.glob("part-*.json"))))
    process = start(list_of_paths, out)
    process.communicate()
    if process.returncode:
        raise SystemExit(f"the last run ended with {process.returncode}")
    return found


def run(count: int, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Do all of it; return the counts.

    Args:
        count: number of paths.
        kills: number of kills.
        seed: of their points.
        folder: for the files.
    """
    small, large = folder / "few.txt", folder / "many.txt"
    write_list(small, min(FEW, count))
    write_list(large, count)
    few_peak, _ = whole(small, folder / "few.csv")
    peak, seconds = whole(large, folder / "whole.csv")
    parts = -(-count // 1024)
    points = sorted(random.Random(seed).sample(range(1, parts), min(kills, parts - 1)))
    at = killed(large, folder / "killed.csv", points)
    one, other = folder / "whole.csv", folder / "killed.csv"
    with other.open(encoding="utf-8") as file:
        next(file)
        paths = [line.partition(",")[0] for line in file]
    unreadable = (folder / "killed.csv.unreadable.csv").read_text().count("\n") - 1
    return {
        "command": f"python tools/million_paths.py --count {count} --kills {kills} --seed {seed}",
        "paths": count,
        "rows": len(paths),
        "rows_twice": len(paths) - len(set(paths)),
        "unreadable": unreadable,
        "killed_at_parts": at,
        "parts": parts,
        "same_bytes": one.read_bytes() == other.read_bytes(),
        "same_unreadable": (folder / "whole.csv.unreadable.csv").read_bytes()
        == (folder / "killed.csv.unreadable.csv").read_bytes(),
        "peak_mib": {str(min(FEW, count)): round(few_peak, 1), str(count): round(peak, 1)},
        "seconds": round(seconds, 1),
        "cores": os.cpu_count(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return 1 if the files differ or a row is missing or there twice."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        predict(*given.worker)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.count, given.kills, given.seed, Path(folder))
    print(json.dumps(found, indent=2))
    if given.json:
        write_json(given.json, found)
    complete = found["rows"] + found["unreadable"] == found["paths"] and not found["rows_twice"]
    return 0 if complete and found["same_bytes"] and found["same_unreadable"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
