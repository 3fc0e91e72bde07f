"""Which file is fastest is known by machine, and loading takes that one."""

import json
import shutil

import pytest

import fastadapt as fa
from fastadapt.export import load, verify_bundle
from fastadapt.export.artefact import Artefact
from fastadapt.export.bundle import measured, verify_artefact
from fastadapt.export.bundle.manifest import read_manifest
from fastadapt.export.bundle.staging import check_target
from fastadapt.files import read_json
from tests.helpers.bundles import reseal
from tests.helpers.command import command

HERE = measured.machine(on_gpu=False)


@pytest.fixture
def bundle(tuned_bundles, tmp_path):
    """A bundle of two files, of which the second was faster where it was made."""
    folder = shutil.copytree(tuned_bundles[0] / "uint8", tmp_path / "b")
    shutil.copy(folder / "model.onnx", folder / "fast.onnx")
    details = {"batch": {"min": 1, "opt": 8, "max": 32}}
    speeds = {"model.onnx": 10.0, "fast.onnx": 20.0}
    rows = [
        Artefact(
            *("onnx", name, "fp32", "verified"),
            speed={"ONNX Runtime, CPU": {"1": speed}},
            files=(name,),
            details=details,
        )
        for name, speed in speeds.items()
    ]
    reseal(folder, artefacts=[row.to_dict() for row in rows], measured=[])
    return folder


def chosen(bundle):
    return load(bundle, device="cpu").artefact.path


def row(bundle, file="model.onnx", machine=HERE, speed=99.0):
    artefact = Artefact("onnx", file, "fp32", "verified", speed={"ONNX Runtime, CPU": {"8": speed}})
    (found,) = measured.measured_rows([artefact], read_manifest(bundle)["files"])
    assert found["machine"] == HERE and found["batch"] == 8
    return {**found, "machine": machine}


def test_the_fastest_of_this_machine(bundle):
    assert chosen(bundle) == "fast.onnx"
    measured.add_rows(bundle, [row(bundle, machine="Another, 8 cores")])
    assert chosen(bundle) == "fast.onnx"
    measured.add_rows(bundle, [row(bundle)])
    assert chosen(bundle) == "model.onnx"
    measured.add_rows(bundle, [row(bundle, "fast.onnx", speed=100.0)])
    assert chosen(bundle) == "fast.onnx"
    # What is measured again replaces what was, of this machine and file alone.
    measured.add_rows(bundle, [row(bundle, "fast.onnx", speed=98.0)])
    assert chosen(bundle) == "model.onnx"
    assert len(read_json(bundle / "measured.json")["rows"]) == 3
    # Speeds of other bytes say nothing.
    stale = {**row(bundle), "sha256": "0" * 64}
    measured.add_rows(bundle, [stale])
    assert chosen(bundle) == "fast.onnx"
    # What did not pass the gate is not taken, however fast.
    measured.add_rows(bundle, [row(bundle)])
    artefacts = read_manifest(bundle)["artefacts"]
    artefacts[0]["status"] = "unverified"
    reseal(bundle, artefacts=artefacts)
    assert chosen(bundle) == "fast.onnx"


def test_rows_of_the_manifest(bundle):
    reseal(bundle, measured=[row(bundle)])
    assert chosen(bundle) == "model.onnx"
    reseal(bundle, measured=[{**row(bundle), "batch": 0}])
    with pytest.raises(fa.InputError, match=r"'measured\.0\.batch' is 0"):
        chosen(bundle)


def test_the_command(bundle, monkeypatch, capfd):
    monkeypatch.setattr(verify_artefact, "measure", lambda *_: {"1": 7.0, "8": 9.0})
    assert command(monkeypatch, "verify", bundle, "--measure") == 0
    assert "speeds are kept in" in capfd.readouterr().out
    rows = measured.read_rows(bundle, read_manifest(bundle))
    assert [(r["file"], r["batch"], r["images_per_second"]) for r in rows] == [
        ("model.onnx", 1, 7.0),
        ("model.onnx", 8, 9.0),
        ("fast.onnx", 1, 7.0),
        ("fast.onnx", 8, 9.0),
    ]
    assert {r["machine"] for r in rows} == {HERE} and {r["precision"] for r in rows} == {"fp32"}
    assert command(monkeypatch, "verify", bundle, "--measure", "--no-speed") == 1
    assert "--measure keeps speeds: leave out --no-speed" in capfd.readouterr().err
    # It is no part of what is hashed, and goes where the bundle goes.
    assert verify_bundle(bundle, speed=False).passed
    check_target(bundle, overwrite=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no valid JSON"),
        ("{}", "holds no measurements of a bundle: delete it"),
        ({"rows": 3}, "'rows' is 3: input should be a valid list"),
        ({"rows": [{"machine": 3}]}, r"'rows\.0\.machine' is 3"),
        ({"rows": [{"images_per_second": "fast"}]}, r"lacks the key 'rows\.0\.machine'"),
    ],
)
def test_a_damaged_file(bundle, content, says):
    if isinstance(content, dict):
        content = json.dumps({"format": measured.FORMAT, **content})
    (bundle / "measured.json").write_text(content)
    with pytest.raises(fa.InputError, match=says) as caught:
        chosen(bundle)
    assert "\n" not in str(caught.value)


def test_a_file_of_others_is_not_replaced(bundle):
    (bundle / "measured.json").write_text("{}")
    with pytest.raises(fa.InputError, match=r"holds measured\.json, which no export wrote"):
        check_target(bundle, overwrite=True)
