"""Run the examples on tiny generated data, without a network."""

import runpy
import struct
import sys
from pathlib import Path
from zlib import crc32

import pytest
import timm
import torch

import fastadapt as fa
from tests.helpers.gdpl_models import make_colours, save_source
from tests.helpers.shallow_models import SHALLOW_VIT

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path, capsys):
    """Run one of the scripts as ``python examples/NAME`` would, in this process."""

    def run(name, *arguments):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_train_loop(run_example, tmp_path):
    said = run_example(
        "train_loop.py", "--backbone", SHALLOW_VIT, "--random-weights", "--epochs", "2"
    )
    assert "epoch 2: loss" in said
    assert float(said.rpartition("at most ")[2]) < 1e-4
    assert (tmp_path / "run" / "adapter.safetensors").is_file()


def test_gdpl_run(run_example, tmp_path):
    pytest.importorskip("open_clip")
    source = save_source(tmp_path / "models")
    data = make_colours(tmp_path / "data", ("a", "b", "c", "d"))
    options = ["--clip", source.clip, "--encoder", source.domain_encoder]
    options += ["--encoder-weights", source.domain_weights, "--shots", "2", "--epochs", "1"]
    options += ["--depth", "2"]
    said = run_example("gdpl_run.py", "--data", data, *options)
    assert "seed 1, base classes: accuracy" in said and "seed 1, novel classes" in said
    assert said.rpartition("something ")[2].startswith(("striped", "crossed"))


def test_export_and_predict(run_example, tmp_path):
    said = run_example(
        "export_and_predict.py", "--backbone", SHALLOW_VIT, "--random-weights", "--epochs", "2"
    )
    assert "validation accuracy" in said
    assert (tmp_path / "bundle" / "model.onnx").is_file()
    assert said.count("crossed/") == said.count("striped/") == 2


def test_http_server(tmp_path):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    # A model without a run is exported in a second.
    torch.save(timm.create_model(SHALLOW_VIT, num_classes=2).state_dict(), tmp_path / "w.pth")
    bundle, names = tmp_path / "bundle", ["crack", "good"]
    weights = {"checkpoint": tmp_path / "w.pth", "class_names": names, "speed": False}
    fa.export.export_timm(SHALLOW_VIT, bundle, **weights)
    app = runpy.run_path(str(EXAMPLES / "http_server.py"))["make_app"](str(bundle))
    client = TestClient(app)
    assert client.get("/health").json()["file"] == "model.onnx"
    path = bundle / "golden" / "00.png"
    found = client.post("/predict", content=path.read_bytes()).json()
    want = fa.export.load(bundle)(path)
    assert found["prediction"] == want.labels[0]
    assert list(found["probabilities"]) == names
    assert list(found["probabilities"].values()) == pytest.approx(want.probabilities[0].tolist())
    for content in (b"no image", b"", b"%!PS-Adobe-3.0 EPSF-3.0", too_large_png()):
        answer = client.post("/predict", content=content)
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("the image cannot be read as an image: ")


def too_large_png():
    """Return a small file of 3.6 gigapixels, of which Pillow raises an error of its own."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", crc32(header))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_run_here_and_says_how(path):
    text = path.read_text()
    assert text.startswith('"""')
    if "__main__" in text:
        assert f"def test_{path.stem}(" in Path(__file__).read_text()
        assert f"    python examples/{path.name}" in text
