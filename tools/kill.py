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
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = "notes of somebody else.txt"
LONGEST = 240  # seconds of a command, on a busy machine
POINTS = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")


class Kill(NamedTuple):
    """When a command is killed: at a share of its time, or at a file operation."""

    share: float | None = None
    operation: int | None = None
    after: bool = False


class Ended(NamedTuple):
    """How a command ended: its exit status, seconds, file operations, and what it said."""

    status: int
    seconds: float
    operations: list[str]
    said: str


def run(arguments: list[Any], kill: Kill | None = None, seconds: float = 0.0) -> Ended:
    """Run the command line in a fork of this process, and kill it.

    Args:
        arguments: of the command line.
        kill: when; never if ``None``.
        seconds: that the command takes, of which ``kill.share`` is a part.
    """
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        said, noted = Path(folder) / "said", Path(folder) / "operations"
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            _be_the_command(arguments, kill, said, noted)
        os.setpgid(process, process)
        if kill is not None and kill.share is not None:
            end = start + kill.share * seconds
            while time.monotonic() < end and _status(process) is None:
                time.sleep(0.002)
            if process not in _ENDED:
                os.kill(process, signal.SIGKILL)
        while _status(process) is None:
            time.sleep(0.002)
            if time.monotonic() > start + LONGEST:
                os.killpg(process, signal.SIGKILL)
        took = time.monotonic() - start
        time.sleep(0.05)
        # Processes that decode end with the one that started them; if not, now.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)
        operations = noted.read_text().splitlines() if noted.exists() else []
        return Ended(_ENDED.pop(process), took, operations, said.read_text(errors="replace"))


_ENDED: dict[int, int] = {}


def _status(process: int) -> int | None:
    if process not in _ENDED:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            _ENDED[process] = os.waitstatus_to_exitcode(status)
    return _ENDED.get(process)


def _be_the_command(arguments: list[Any], kill: Kill | None, said: Path, noted: Path) -> None:
    """Run a command and end the process; file operations are noted, and one may be the last."""
    status = 70
    try:
        os.setpgid(0, 0)
        output = os.open(said, os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        _watch_files(kill, noted)
        sys.argv = ["fastadapt", *map(str, arguments)]
        from fastadapt import cli

        cli.main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch_files(kill: Kill | None, noted: Path) -> None:
    """Put watchers around the functions by which files come, go and change their names."""
    from fastadapt import files

    notes, process, count = noted.open("w"), os.getpid(), 0

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if os.getpid() != process:
                return function(*args, **kwargs)
            number, count = count, count + 1
            mine = kill is not None and kill.operation == number
            notes.write(f"{name} {Path(str(args[0])).name}\n")
            notes.flush()
            if mine and not kill.after:
                os.kill(process, signal.SIGKILL)
            result = function(*args, **kwargs)
            if mine:
                os.kill(process, signal.SIGKILL)
            return result

        return watch

    for name in POINTS:
        setattr(os, name, watched(name, getattr(os, name)))
    original = files.exchange
    for module in list(sys.modules.values()):
        if getattr(module, "exchange", None) is original:
            module.exchange = watched("exchange", original)


class Operation:
    """A command that is killed.

    Args:
        folder: of its inputs, which stay.
        inputs: what all operations share.
    """

    name = ""
    weight = 1

    def __init__(self, folder: Path, inputs: Inputs):
        self.folder, self.inputs = folder, inputs
        folder.mkdir()
        whole = folder / "whole"
        self.before(whole)
        self.whole = run(self.arguments(whole))
        if self.whole.status:
            raise RuntimeError(f"{self.name} fails without a kill: {self.whole.said[-800:]}")
        self.expected = self.result(whole)

    def before(self, place: Path) -> None:
        """Make what is there before the command."""
        place.mkdir()

    def arguments(self, place: Path) -> list[Any]:
        """Return the command's arguments."""
        raise NotImplementedError

    def result(self, place: Path) -> Any:
        """Return what a finished command has left, to be compared."""
        raise NotImplementedError

    def wrong_now(self, place: Path) -> str:
        """Say what is wrong right after a kill; empty if nothing is."""
        raise NotImplementedError

    def again(self, place: Path) -> list[list[Any]]:
        """Return the commands of which one must finish the work."""
        raise NotImplementedError

    def check(self, place: Path, kill: Kill) -> str:
        """Kill the command once; return what is wrong, empty if nothing is."""
        self.before(place)
        ended = run(self.arguments(place), kill, self.whole.seconds)
        wrong = self.wrong_now(place)
        if wrong:
            return f"after the kill: {wrong}"
        said = ""
        for arguments in self.again(place):
            done = run(arguments)
            if done.status == 0:
                break
            said = done.said[-400:]
        else:
            return f"cannot be finished: {said}"
        found = self.result(place)
        if found != self.expected:
            return f"other results than without a kill (killed: {ended.status})"
        return leftovers(place)


def leftovers(place: Path) -> str:
    """Name temporary files that a finished command has left."""
    found = [str(path.relative_to(place)) for path in place.rglob("*") if _is_temporary(path)]
    return f"left {found[0]}" if found else ""


def _is_temporary(path: Path) -> bool:
    return path.name.endswith((".tmp", ".parts")) or path.name.startswith((".bundle", "bundle."))


def readable(place: Path) -> str:
    """Say which file that is no temporary one cannot be read."""
    from fastadapt.files import read_json, read_tensors

    for path in sorted(place.rglob("*")):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".safetensors":
                read_tensors(path)
        except ValueError as error:
            return f"{path.name} is there by halves: {error}"
    return ""


class _Training(Operation):
    results = ("adapter.safetensors", "labels.txt", "predictions.csv", "splits.csv")
    command: tuple[Any, ...] = ()

    def arguments(self, place: Path) -> list[Any]:
        return [*self.command, *self.inputs.training[self.name], "--out", place / "run"]

    def result(self, place: Path) -> Any:
        from fastadapt.files import read_tensors, sha256_tensors

        run = place / "run"
        found = {
            name: (run / name).read_bytes() for name in self.results[1:] if (run / name).exists()
        }
        metrics = (run / "metrics.jsonl").read_text().splitlines()
        return found, sha256_tensors(read_tensors(run / self.results[0])[0]), len(metrics)

    def wrong_now(self, place: Path) -> str:
        run = place / "run"
        if not run.exists():
            return ""
        (run / FOREIGN).write_text("mine")
        self.begun = (run / "state.safetensors").exists()
        if not self.begun and (run / "config.json").exists() and (run / "results.json").exists():
            return "" if self.result(place) == self.expected else "a finished run of other results"
        return readable(run)

    def again(self, place: Path) -> list[list[Any]]:
        resume = [*self.arguments(place), "--resume"]
        if (place / "run" / "state.safetensors").exists():
            return [resume]  # nothing else may be needed
        return [resume, self.arguments(place), [*self.arguments(place), "--overwrite"]]

    def check(self, place: Path, kill: Kill) -> str:
        wrong = super().check(place, kill)
        run = place / "run"
        foreign = (run / FOREIGN).exists() or not getattr(self, "begun", False)
        return wrong or ("" if foreign else f"{FOREIGN} is gone")


class Train(_Training):
    """Train in both stages."""

    name, weight, command = "train", 6, ("train",)


class Resume(_Training):
    """Go on with a run that was killed before: the second kill of the same run."""

    name, weight, command = "resume", 4, ("train",)

    def check(self, place: Path, kill: Kill) -> str:
        self.before(place)
        run(self.arguments(place), Kill(share=0.6), self.whole.seconds)
        if not (place / "run" / "state.safetensors").exists():
            shutil.rmtree(place)
            return super().check(place, kill)
        (place / "run" / FOREIGN).write_text("mine")
        run([*self.arguments(place), "--resume"], kill, self.whole.seconds / 2)
        if not (place / "run" / FOREIGN).exists():
            return f"{FOREIGN} is gone"
        return self.wrong_now(place) or self._finish(place)

    def _finish(self, place: Path) -> str:
        for arguments in self.again(place):
            done = run(arguments)
            if done.status == 0:
                same = self.result(place) == self.expected
                return leftovers(place) if same else "other results than without kills"
        return f"cannot be finished: {done.said[-400:]}"


class Gdpl(_Training):
    """Train GDPL."""

    name, weight, command = "gdpl", 2, ("gdpl",)


class Export(Operation):
    """Export a run where no bundle is."""

    name, weight = "export", 3
    overwrites = False

    def before(self, place: Path) -> None:
        place.mkdir()
        (place / FOREIGN).write_text("mine")
        if self.overwrites:
            shutil.copytree(self.inputs.old_bundle, place / "bundle")

    def arguments(self, place: Path) -> list[Any]:
        return [
            *("export", self.inputs.run, "--out", place / "bundle", "--no-speed"),
            *("--images", self.inputs.images),
            *(["--overwrite"] if self.overwrites else []),
        ]

    def result(self, place: Path) -> Any:
        manifest = _whole_bundle(place / "bundle")
        return manifest["source"]["adapter_sha256"], manifest["labels"], _names(place)

    def wrong_now(self, place: Path) -> str:
        if (place / FOREIGN).read_text() != "mine":
            return f"{FOREIGN} was changed"
        bundle = place / "bundle"
        if not bundle.exists():
            return "the old bundle is gone" if self.overwrites else ""
        try:
            adapter = _whole_bundle(bundle)["source"]["adapter_sha256"]
        except ValueError as error:
            return f"half a bundle: {error}"
        return "" if adapter in self.inputs.adapters else "a bundle of another run"

    def again(self, place: Path) -> list[list[Any]]:
        if (place / "bundle").exists() and not self.overwrites:
            return [[*self.arguments(place), "--overwrite"]]
        return [self.arguments(place)]


class ExportOver(Export):
    """Export a run where the bundle of another is."""

    name, weight, overwrites = "export --overwrite", 3, True


def _whole_bundle(bundle: Path) -> dict[str, Any]:
    from fastadapt.export.bundle.consistency import check_consistency
    from fastadapt.export.bundle.manifest import check_accepted, check_files, read_manifest

    manifest = read_manifest(bundle)
    check_accepted(bundle, manifest)
    check_files(bundle, manifest)
    check_consistency(bundle, manifest)
    return manifest


def _names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if not path.name.endswith(".lock"))


class Predict(Operation):
    """Predict images to a file, in parts."""

    name, weight = "predict", 4
    source = "bundle"

    def before(self, place: Path) -> None:
        place.mkdir()
        (place / FOREIGN).write_text("mine")

    def arguments(self, place: Path) -> list[Any]:
        given = {"bundle": self.inputs.old_bundle, "run": self.inputs.run}[self.source]
        return [
            *(self.name, given, self.inputs.images, "--out", place / "rows.csv"),
            *("--batch", "2", "--workers", "1"),
        ]

    def result(self, place: Path) -> Any:
        return (place / "rows.csv").read_bytes(), _names(place)

    def wrong_now(self, place: Path) -> str:
        if (place / FOREIGN).read_text() != "mine":
            return f"{FOREIGN} was changed"
        file = place / "rows.csv"
        half = file.exists() and file.read_bytes() != self.expected[0]
        return "half a file of results" if half else ""

    def again(self, place: Path) -> list[list[Any]]:
        if (place / "rows.csv").exists() and not (place / "rows.csv.parts").exists():
            return [[*self.arguments(place), "--overwrite"]]
        return [[*self.arguments(place), "--resume"]]


class Embed(Predict):
    """Compute features of images to a file, in parts."""

    name, weight, source = "embed", 3, "run"


class Inputs:
    """What all commands are given, made once, by a fork: ONNX Runtime's threads do not survive one.

    Args:
        folder: where they are made.
    """

    def __init__(self, folder: Path):
        self.images, self.old_bundle = folder / "old" / "images", folder / "old" / "bundle"
        self.run = folder / "new" / "run"
        process = os.fork()
        if process == 0:
            status = 1
            try:
                _make_inputs(folder)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(process, 0)[1]:
            raise RuntimeError("the inputs cannot be made")
        runs = (self.run, folder / "old" / "run")
        configs = [json.loads((run / "config.json").read_text()) for run in runs]
        self.adapters = {config["weights_sha256"] for config in configs}
        train = [
            *(folder / "data", "--backbone", "test_resnet", "--weights", folder / "resnet.pth"),
            *("--image-size", "32", "--rank", "4", "--centers", "2", "--stages", "2"),
            *("--epochs", "3", "--epochs2", "2", "--batch-size", "8", "--save-every", "0"),
            *("--device", "cpu", "--precision", "fp32"),
        ]
        gdpl = [
            *(folder / "colours", "--clip", f"local-dir:{folder / 'clip'}", "--device", "cpu"),
            *("--domain-encoder", "test_efficientnet", "--domain-size", "32", "--epochs", "2"),
            *("--domain-weights", folder / "clip" / "encoder.safetensors"),
            *("--prompt-depth", "2", "--low-rank", "2", "--shots", "2"),
        ]
        self.training = {"train": train, "resume": train, "gdpl": gdpl}


def _make_inputs(folder: Path) -> None:
    import timm
    import torch

    from tests.helpers.fuzz.models import make_bundle, make_run
    from tests.helpers.gdpl_models import make_colours, save_source
    from tests.helpers.imagesets import make_folders

    make_folders(folder / "data", per_class=6)
    (folder / "old").mkdir()
    make_bundle(folder / "old")
    (folder / "new").mkdir()
    make_run(folder / "new", seed=7)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "resnet.pth")
    make_colours(folder / "colours", ("red", "green"), count=6)
    save_source(folder / "clip")


OPERATIONS = {kind.name: kind for kind in (Train, Resume, Gdpl, Export, ExportOver, Predict, Embed)}


def campaign(kills: int, first: int, only: str | None, folder: Path) -> dict[str, Any]:
    """Kill commands and return the counts."""
    from fastadapt.bench.harness import git_commit
    from fastadapt.info import versions

    inputs = Inputs(folder)
    chosen = [kind for name, kind in OPERATIONS.items() if only in (None, name)]
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
        counts[operation.name] += Counter(
            {"kills": 1, f"at a {kind}": 1, "wrong": int(bool(wrong))}
        )
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


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill")
    parser.add_argument("--only", choices=sorted(OPERATIONS), help="one command")
    parser.add_argument("--out", type=Path, help="file to write the counts to as well")
    args = parser.parse_args()
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
        counts = campaign(args.kills, args.first, args.only, Path(folder))
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
