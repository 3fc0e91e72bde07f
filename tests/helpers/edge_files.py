"""What files of the edge runtimes have to do, whichever runtime it is."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fastadapt as fa
from fastadapt.export import EngineOptions, verify_bundle
from fastadapt.export.artefact import REFUSED, UNVERIFIED, VERIFIED
from fastadapt.export.bundle import build
from fastadapt.export.bundle.build import build_artefacts
from fastadapt.export.precision import int8
from fastadapt.export.runtimes import load_runtime
from fastadapt.export.settings import Batches
from fastadapt.files import read_json
from tests.helpers.command import command
from tests.helpers.imagesets import make_folders


def check_file(folded, kind, suffix, capfd):
    """Build a file through the gate, and run it with arrays and tensors."""
    options = EngineOptions(**{kind: True}, batch=Batches(1, 2, 4))
    capfd.readouterr()
    _, artefact = build_artefacts(options, folded)
    assert (artefact.kind, artefact.path) == (kind, f"model.fp32.{suffix}")
    assert artefact.status == VERIFIED, artefact.reason
    assert artefact.files == (artefact.path,)
    assert [p.batch for p in artefact.parity] == [1, 2, 3, 4]
    assert artefact.details["targets"] == ["cpu"]
    assert {file.name for file in folded.folder.iterdir()} == {"model.onnx", artefact.path}

    said = capfd.readouterr().err
    assert not said, said
    runtime = load_runtime(folded.folder / artefact.path, threads=1)
    images = folded.reference.inputs["images"]
    first = runtime(images[:3])
    kept = first.copy()
    tensors = runtime(torch.from_numpy(images[3:6]))
    np.testing.assert_array_equal(first, kept)  # a later call leaves earlier results alone
    said = capfd.readouterr().err
    assert not said, said
    expected = load_runtime(folded.onnx)(images[:6])
    outputs = np.concatenate([first, tensors.numpy()])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def check_int8(folded, kind, suffix, monkeypatch):
    """Refuse a file in INT8 that is not faster, and build one that counts as faster."""
    monkeypatch.setattr(build, "_tell", lambda console, artefact: None)
    # ONNX Runtime's own INT8 has its tests elsewhere.
    monkeypatch.setattr(build, "build_int8", lambda *args: None)
    options = EngineOptions(**{kind: True}, int8=True, batch=Batches(1, 2, 4))
    kept = {"model.onnx", f"model.fp32.{suffix}"}
    for speed, status, files in (
        (0.5, REFUSED, ()),
        (2.0, VERIFIED, (f"model.int8.{suffix}",)),
    ):
        # A model of this size is not faster: what is measured elsewhere is given.
        monkeypatch.setattr(int8, "speeds_in_turns", lambda *args, ratio=speed: (1.0, ratio))
        _, _, artefact, _ = build_artefacts(options, folded)
        assert artefact.status == status, artefact.reason
        assert (artefact.kind, artefact.precision, artefact.files) == (kind, "int8", files)
        judgement = artefact.details["judgement"]
        assert judgement["accuracy"] == 1.0 and judgement["rival"] == "fp32"
        assert {file.name for file in folded.folder.iterdir()} == {*kept, *files}
    assert [p.batch for p in artefact.parity] == [1, 2, 3, 4]
    size = (folded.folder / f"model.int8.{suffix}").stat().st_size
    assert size < 0.6 * (folded.folder / f"model.fp32.{suffix}").stat().st_size


def check_bundle(made, folder, monkeypatch, kind, suffix):
    """Go from a run to labels of images by the command line, and to a machine that is not ours."""
    bundle, name = folder / "b", f"model.fp32.{suffix}"
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    arguments = (made / "run", "--out", bundle, f"--{kind}", "--with-features", "--no-speed")
    assert command(monkeypatch, "export", *arguments) == 0
    assert name in read_json(bundle / "manifest.json")["files"]
    assert verify_bundle(bundle, speed=False).artefacts[1].status == VERIFIED
    make_folders(folder / "images", per_class=1)
    files = sorted((folder / "images").rglob("*.png"))
    expected = fa.export.load(bundle, "model.onnx")(files)
    predicted = fa.export.load(bundle, name)(files)
    assert predicted.labels == expected.labels
    np.testing.assert_allclose(predicted.logits, expected.logits, rtol=1e-3, atol=1e-4)

    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "another machine"))
    assert verify_bundle(bundle, speed=False).artefacts[1].status == UNVERIFIED
    with pytest.raises(fa.InputError, match="is a program of its runtime and the bundle was not"):
        fa.export.load(bundle, name)
    assert fa.export.load(bundle, name, trust=True)(files[0]).labels == expected.labels[:1]
    changed = Path(shutil.copytree(bundle, folder / "changed"))
    (changed / name).write_bytes((changed / name).read_bytes()[:-1])
    with pytest.raises(fa.InputError, match="it was truncated or changed"):
        fa.export.load(changed, name, trust=True)


def check_refused(backend, library, path):
    """Refuse a model that cannot be converted, and a file that is none, in one line each."""

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x[:, 0].float()).abs()

    with pytest.raises(fa.InputError, match=f"{library} cannot convert the model: ") as caught:
        backend.convert(Odd(), (torch.rand(1, 1, 4, 4),), path, Batches())
    assert "\n" not in str(caught.value) and not list(path.parent.iterdir())
    path.write_bytes(b"no program" * 100)
    with pytest.raises(fa.InputError, match=rf"{library} cannot load m\.{path.suffix[1:]}: "):
        load_runtime(path)
