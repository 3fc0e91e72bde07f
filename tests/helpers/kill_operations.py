"""The commands that ``tools/kill.py`` kills, what they are given, and what must be true then."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.helpers.kill_process import Ended, Kill, run

FOREIGN = "notes of somebody else.txt"


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

    def was_complete(self, done: Ended) -> bool:
        """Say whether a command was refused since its work was done before."""
        return False

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
            if done.status == 0 or self.was_complete(done):
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
        """Return the arguments."""
        return [*self.command, *self.inputs.training[self.name], "--out", place / "run"]

    def result(self, place: Path) -> Any:
        """Return what is compared."""
        from fastadapt.files import read_tensors, sha256_tensors

        run = place / "run"
        found = {
            name: (run / name).read_bytes() for name in self.results[1:] if (run / name).exists()
        }
        metrics = (run / "metrics.jsonl").read_text().splitlines()
        return found, sha256_tensors(read_tensors(run / self.results[0])[0]), len(metrics)

    def wrong_now(self, place: Path) -> str:
        """Look for loss and halves."""
        run = place / "run"
        self.begun = (run / "state.safetensors").exists()
        if self.begun:  # an unfinished run: what is put there must survive its end
            (run / FOREIGN).write_text("mine")
        if not run.exists():
            return ""
        if not self.begun and (run / "config.json").exists() and (run / "results.json").exists():
            return "" if self.result(place) == self.expected else "a finished run of other results"
        return readable(run)

    def again(self, place: Path) -> list[list[Any]]:
        """Return the command that finishes."""
        resume = [*self.arguments(place), "--resume"]
        if (place / "run" / "state.safetensors").exists():
            return [resume]  # nothing else may be needed
        return [resume, self.arguments(place), [*self.arguments(place), "--overwrite"]]

    def check(self, place: Path, kill: Kill) -> str:
        """Kill the run twice, or once."""
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
        """Kill the run twice, or once."""
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
        """Put a file of somebody else there."""
        place.mkdir()
        (place / FOREIGN).write_text("mine")
        if self.overwrites:
            shutil.copytree(self.inputs.old_bundle, place / "bundle")

    def arguments(self, place: Path) -> list[Any]:
        """Return the arguments."""
        return [
            *("export", self.inputs.run, "--out", place / "bundle", "--no-speed"),
            *("--images", self.inputs.images),
            *(["--overwrite"] if self.overwrites else []),
        ]

    def result(self, place: Path) -> Any:
        """Return what is compared."""
        manifest = _whole_bundle(place / "bundle")
        return manifest["source"]["adapter_sha256"], manifest["labels"], _names(place)

    def wrong_now(self, place: Path) -> str:
        """Look for loss and halves."""
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
        """Return the command that finishes."""
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
        """Put a file of somebody else there."""
        place.mkdir()
        (place / FOREIGN).write_text("mine")

    def arguments(self, place: Path) -> list[Any]:
        """Return the arguments."""
        given = {"bundle": self.inputs.old_bundle, "run": self.inputs.run}[self.source]
        return [
            *(self.name, given, self.inputs.images, "--out", place / "rows.csv"),
            *("--batch", "2", "--workers", "1"),
        ]

    def result(self, place: Path) -> Any:
        """Return what is compared."""
        return (place / "rows.csv").read_bytes(), _names(place)

    def wrong_now(self, place: Path) -> str:
        """Look for loss and halves."""
        if (place / FOREIGN).read_text() != "mine":
            return f"{FOREIGN} was changed"
        file = place / "rows.csv"
        half = file.exists() and file.read_bytes() != self.expected[0]
        return "half a file of results" if half else ""

    def was_complete(self, done: Ended) -> bool:
        """Say whether the rows were complete."""
        return "rows.csv is there, and complete" in done.said

    def again(self, place: Path) -> list[list[Any]]:
        """Return the command that finishes."""
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
        bundles: make a run and two bundles, too.
    """

    def __init__(self, folder: Path, *, bundles: bool = True):
        self.images, self.old_bundle = folder / "old" / "images", folder / "old" / "bundle"
        self.run = folder / "new" / "run"
        process = os.fork()
        if process == 0:
            status = 1
            try:
                _make_inputs(folder, bundles)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(process, 0)[1]:
            raise RuntimeError("the inputs cannot be made")
        if bundles:
            runs = (self.run, folder / "old" / "run")
            configs = [json.loads((run / "config.json").read_text()) for run in runs]
            _export_by_copying(folder / "new" / "bundle")
            self.adapters = {config["weights_sha256"] for config in configs}
        train = [
            *(folder / "data", "--backbone", "test_resnet", "--weights", folder / "resnet.pth"),
            *("--image-size", "32", "--rank", "4", "--centers", "2", "--stages", "2"),
            *("--epochs", "3", "--epochs2", "2", "--batch-size", "8", "--save-every", "0"),
            *("--device", "cpu"),
        ]
        gdpl = [
            *(folder / "colours", "--clip", f"local-dir:{folder / 'clip'}", "--device", "cpu"),
            *("--domain-encoder", "test_efficientnet", "--domain-size", "32", "--epochs", "2"),
            *("--domain-weights", folder / "clip" / "encoder.safetensors"),
            *("--prompt-depth", "2", "--low-rank", "2", "--shots", "2", "--train-classes", "all"),
        ]
        self.training = {"train": train, "resume": train, "gdpl": gdpl}


def _make_inputs(folder: Path, bundles: bool) -> None:
    import timm
    import torch

    from tests.helpers.fuzz.models import make_bundle
    from tests.helpers.gdpl_models import make_colours, save_source
    from tests.helpers.imagesets import make_folders

    make_folders(folder / "data", per_class=6)
    if bundles:
        (folder / "old").mkdir()
        make_bundle(folder / "old")
        (folder / "new").mkdir()
        make_bundle(folder / "new", seed=7)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "resnet.pth")
    make_colours(folder / "colours", ("red", "green"), count=6)
    save_source(folder / "clip")


def _export_by_copying(bundle: Path) -> None:
    """Let exports copy the graph that was exported before: the seconds of it prove nothing."""
    from fastadapt.export.bundle import material

    described = json.loads((bundle / "manifest.json").read_text())["model"]
    described = {key: described[key] for key in ("opset", "inputs", "outputs")}

    def copy(folded: Any, path: Path, **options: Any) -> dict[str, Any]:
        shutil.copy(bundle / "model.onnx", path)
        return described

    material.export_onnx = copy


OPERATIONS = {kind.name: kind for kind in (Train, Resume, Gdpl, Export, ExportOver, Predict, Embed)}
