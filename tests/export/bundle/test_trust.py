"""Native code of bundles from elsewhere runs only if the user trusts their maker."""

import json
import shutil

import pytest

import fastadapt as fa
from fastadapt.export import load, verify_bundle
from fastadapt.export.artefact import Artefact
from fastadapt.export.bundle import trust
from fastadapt.files import read_json
from tests.helpers.bundles import reseal
from tests.helpers.command import command


@pytest.fixture
def bundle(made, tmp_path, monkeypatch):
    """A bundle with a .pt2 that loads nothing: who loads it is seen."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = shutil.copytree(made / "bundle", tmp_path / "b")
    (folder / "m.pt2").write_bytes(b"code")
    details = {"version": "2", "targets": ["cpu NONE"], "batch": {"min": 1, "opt": 2, "max": 4}}
    (folder / "m.pt2.json").write_text(json.dumps(details))
    row = Artefact(
        "aotinductor",
        "m.pt2",
        "fp32",
        "verified",
        files=("m.pt2", "m.pt2.json"),
        details=details,
        speed={"AOTInductor, CPU": {"1": 1e9}},
    )
    manifest = read_json(folder / "manifest.json")
    reseal(folder, artefacts=[*manifest["artefacts"], row.to_dict()])
    return folder


@pytest.fixture
def loaded(monkeypatch):
    names = []

    def seen(path, kind=None, **options):
        names.append(path.name)
        return real(path, kind, **options)

    from fastadapt.export import predictor
    from fastadapt.export.bundle import verify_artefact

    real = predictor.load_runtime
    for module in (predictor, verify_artefact):
        monkeypatch.setattr(module, "load_runtime", seen)
    return names


def test_code_from_elsewhere_does_not_run(bundle, loaded):
    result = verify_bundle(bundle, speed=False)
    assert result.passed and loaded == ["model.onnx"]
    found = result.artefacts[1]
    assert found.status == "unverified"
    assert "m.pt2 holds native code and the bundle was not made on this machine" in found.reason
    assert load(bundle).artefact.path == "model.onnx"
    with pytest.raises(fa.InputError, match="`trust=True` if you trust its maker"):
        load(bundle, "m.pt2")
    assert set(loaded) == {"model.onnx"}


@pytest.mark.parametrize("kind", ["executorch", "litert"])
def test_programs_of_runtimes_are_treated_alike(bundle, kind):
    manifest = read_json(bundle / "manifest.json")
    program = Artefact(kind, "m", "fp32", "verified")
    assert "m is a program of its runtime and" in str(trust.why_not_run(program, manifest, False))
    assert trust.why_not_run(program, manifest, True) is None


def test_with_trust_it_does(bundle, loaded):
    verify_bundle(bundle, speed=False, trust=True)
    assert "m.pt2" in loaded
    with pytest.raises(fa.InputError, match=r"m\.pt2 was compiled for cpu NONE"):
        load(bundle, "m.pt2", trust=True)


def test_what_was_made_here_is_known_by_its_hash(bundle, loaded):
    trust.remember_bundle(read_json(bundle / "manifest.json"))
    verify_bundle(bundle, speed=False)
    assert "m.pt2" in loaded
    loaded.clear()
    reseal(bundle, compared_on="changed by someone")
    verify_bundle(bundle, speed=False)
    assert "m.pt2" not in loaded


def test_exports_are_remembered(run, tmp_path, monkeypatch, quick, no_speed):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    manifest = fa.export.export_run(run, tmp_path / "b").manifest
    assert trust.made_here(manifest)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    assert not trust.made_here(manifest)


def test_a_home_that_cannot_be_written_to(run, tmp_path, monkeypatch, quick, no_speed):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    manifest = fa.export.export_run(run, tmp_path / "b").manifest
    assert not trust.made_here(manifest)


def test_the_command_line_names_its_option(bundle, monkeypatch, capfd):
    assert command(monkeypatch, "verify", bundle, "--no-speed", "--json") == 0
    assert "--trust" in json.loads(capfd.readouterr().out)["artefacts"][1]["reason"]
