"""Kill commands at random times and at every file operation, and see that nothing is lost.

    python tools/kill.py --kills 220
    python tools/kill.py --only export --kills 5 --first 40

Each kill (SIGKILL) ends one of: train (both stages), train --resume, gdpl, export, export
--overwrite of another bundle, predict, embed. Half of the kills come at a random time, half before
or after a random file operation (rename, exchange, fsync, unlink, mkdir, rmdir). After a kill

1. what was there before is there still: foreign files, and the old bundle until the new one is;
2. no half result passes for a whole one: files are readable, a bundle is the old or the new;
3. the command, given again (with --resume where something was begun), ends with the same weights
   and rows as one that was not killed, and leaves no temporary files.

A process that has imported everything forks one for each command. Prints the counts as JSON and
the faults to standard error; exits with 1 if there are any. A kill comes again with ``--only``,
``--first NUMBER --kills 1``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def campaign(kills: int, first: int, only: str | None, folder: Path) -> dict[str, Any]:
    """Kill commands and return the counts."""
    from fastadapt.bench.harness import git_commit
    from fastadapt.info import versions
    from tests.helpers.kill_operations import OPERATIONS, Inputs
    from tests.helpers.kill_process import Kill

    chosen = [kind for name, kind in OPERATIONS.items() if only in (None, name)]
    if not chosen:
        raise SystemExit(f"--only {only}: expected one of {', '.join(OPERATIONS)}")
    inputs = Inputs(folder, bundles=only not in ("train", "resume", "gdpl"))
    made = {kind: kind(folder / kind.name.replace(" ", ""), inputs) for kind in chosen}
    turns = [kind for kind in chosen for _ in range(kind.weight)]
    counts = {kind.name: Counter() for kind in chosen}
    faults, points, start = [], Counter(), time.monotonic()
    for number in range(first, first + kills):
        operation = made[turns[number * 7 % len(turns)]]
        choose = random.Random(f"{operation.name} {number}")
        noted = operation.whole.operations
        at = choose.randrange(len(noted))
        kill = Kill(choose.random()) if number % 2 else Kill(None, at, choose.random() < 0.5)
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        wrong = operation.check(place, kill)
        kind = "time" if number % 2 else "point"
        counts[operation.name].update({"kills": 1, f"at a {kind}": 1, "wrong": int(bool(wrong))})
        if not number % 2:
            points[noted[at].split()[0]] += 1
        if wrong:
            at_what = noted[at] if kill.operation is not None else f"{kill.share:.2f} of its time"
            faults.append(
                f"{operation.name} kill {number} ({at_what}, after={kill.after}): {wrong}"
            )
            print(faults[-1], file=sys.stderr, flush=True)
    return {
        "commit": git_commit(),
        "command": f"python tools/kill.py --kills {kills} --first {first}",
        "versions": versions(),
        "seconds": round(time.monotonic() - start),
        "kills": sum(count["kills"] for count in counts.values()),
        "wrong": len(faults),
        "commands": counts,
        "points": points,
        "faults": faults,
    }


def _here(kills: int, first: int, only: str | None) -> dict[str, Any]:
    """Run a campaign in this process."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MPLBACKEND": "Agg"}
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)  # a fork has no threads of its parent's
    _import_everything()
    from fastadapt.export.predict import job

    job.PART = 4  # several parts of a few images
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"
        return campaign(kills, first, only, Path(folder))


def _in_shards(kills: int, first: int, only: str | None, shards: int) -> dict[str, Any]:
    """Run parts of a campaign in processes, and add up their counts."""
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        parts, processes, start = [], [], time.monotonic()
        bounds = [first + kills * i // shards for i in range(shards + 1)]
        for low, high in itertools.pairwise(bounds):
            parts.append(Path(folder) / f"{low}.json")
            command = [sys.executable, __file__, "--kills", str(high - low), "--first", str(low)]
            command += ["--out", str(parts[-1]), *(["--only", only] if only else [])]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        statuses = [process.wait() for process in processes]
        found = [json.loads(part.read_text()) for part in parts if part.exists()]
    counts: dict[str, Any] = dict(found[0])
    commands: dict[str, Counter] = {}
    for part in found:
        for name, count in part["commands"].items():
            commands.setdefault(name, Counter()).update(count)
    counts["commands"] = commands
    counts["points"] = sum((Counter(part["points"]) for part in found), Counter())
    counts["faults"] = [fault for part in found for fault in part["faults"]]
    counts["faults"] += [f"a process ended with {s}" for s in statuses if s not in (0, 1)]
    counts["command"] = f"python tools/kill.py --kills {kills} --first {first} --shards {shards}"
    counts["kills"], counts["wrong"] = sum(p["kills"] for p in found), len(counts["faults"])
    counts["seconds"] = round(time.monotonic() - start)
    return counts


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill")
    parser.add_argument("--shards", type=int, default=1, help="processes")
    parser.add_argument("--only", help="one command: train, export, predict, …")
    parser.add_argument("--out", type=Path, help="file to write the counts to as well")
    args = parser.parse_args()
    shards = min(args.shards, args.kills)
    if shards > 1:
        counts = _in_shards(args.kills, args.first, args.only, shards)
    else:
        counts = _here(args.kills, args.first, args.only)
    text = json.dumps(counts, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 1 if counts["faults"] else 0


def _import_everything() -> None:
    """Import what commands import, so that a fork starts at once."""
    import importlib
    import pkgutil

    import matplotlib.pyplot  # noqa: F401
    import onnxruntime  # noqa: F401
    import open_clip  # noqa: F401
    import sklearn.metrics  # noqa: F401

    for name in ("fastadapt", "fastadapt.export"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith(("__main__", "aot")):
                importlib.import_module(module.name)


if __name__ == "__main__":
    sys.exit(main())
