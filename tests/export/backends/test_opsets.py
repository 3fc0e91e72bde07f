import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest

import fastadapt as fa
from fastadapt.export.backends.onnx import export_onnx
from fastadapt.export.backends.opsets import (
    Operator,
    older_runtimes,
    older_runtimes_of,
    tensorrt_problems,
)
from fastadapt.export.graph_input import GraphInput
from fastadapt.export.runtimes import load_runtime
from fastadapt.export.settings import BundleSettings

OLD = "1.20.1"
RUN = """
import sys
import numpy as np, onnxruntime
assert onnxruntime.__version__ == sys.argv[1], onnxruntime.__version__

def load(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

session = load(sys.argv[2])
try:
    load(sys.argv[5])
except Exception as error:
    assert "22" in str(error), error
else:
    raise AssertionError("opset 22 was taken")
images = np.load(sys.argv[3])
np.save(sys.argv[4], session.run(None, {"images": images})[0])
"""


@pytest.fixture(scope="module")
def old_runtime(tmp_path_factory):
    """A folder with ONNX Runtime 1.20, which the installed one would replace."""
    folder = tmp_path_factory.mktemp("onnxruntime")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, f"onnxruntime=={OLD}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"onnxruntime {OLD} cannot be installed here")
    return folder


@pytest.fixture(scope="module")
def graphs(folded_model, tmp_path_factory):
    """A path and its description for each opset; the export's own choice for None."""
    folder = tmp_path_factory.mktemp("opsets")

    @functools.cache
    def write(opset):
        path = folder / f"{opset}.onnx"
        chosen = {} if opset is None else {"opset": opset}
        return path, folded_model.write_onnx(folded_model.module, path, **chosen)

    return write


@pytest.mark.parametrize(("opset", "asked_for"), [(18, 18), (20, None)])
def test_an_older_runtime_gives_the_same(
    folded_model, graphs, old_runtime, tmp_path, opset, asked_for
):
    """The graph that a bundle holds, in the release that Jetson's packages have."""
    path = tmp_path / "model.onnx"
    written, described = graphs(asked_for)
    shutil.copy(written, path)
    assert described["opset"] == opset
    model = onnx.load(path)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset}
    assert model.ir_version == {18: 8, 20: 9}[opset]  # what releases of the opset's time know
    model.opset_import[0].version = 22  # which the table says that 1.20 does not take
    onnx.save(model, tmp_path / "newer.onnx")
    images = folded_model.reference.inputs["images"]
    np.save(tmp_path / "x.npy", images)
    arguments = [OLD, path, tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "newer.onnx"]
    subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        env={"PYTHONPATH": str(old_runtime), "PATH": "/usr/bin:/bin"},
        check=True,
        timeout=300,
    )
    newest = load_runtime(path, device="cpu")(images)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), newest, rtol=1e-4, atol=1e-5)


def test_what_is_exported_lies_within_tensorrt_10_3(graphs):
    _, described = graphs(None)
    assert described["taken_by"] == {
        "onnxruntime": "1.17 or newer",
        "tensorrt": "10.3 or newer",
    }


def test_a_graph_that_resizes_does_not(folded_model, tmp_path):
    given = GraphInput(fa.data.preprocess.Preprocess((3, 32, 32)), resize=True)
    described = export_onnx(
        folded_model.module, tmp_path / "m.onnx", input_size=(3, 32, 32), graph_input=given
    )
    assert described["taken_by"]["tensorrt"] == "Resize with antialiasing: not in TensorRT 10.3"


def test_what_is_in_the_way_is_named():
    found = older_runtimes(23, [Operator("Attention", {}), Operator("Add", {})])
    assert found == {
        "onnxruntime": "1.23 or newer",
        "tensorrt": "opset 23; TensorRT 10.3 takes up to 20; Attention: not in TensorRT 10.3",
    }
    assert older_runtimes(22, [])["onnxruntime"] == "1.21 or newer"
    assert older_runtimes(99, [])["onnxruntime"] == "the newest"
    assert tensorrt_problems(20, [Operator("Resize", {"antialias": 0})]) == []


def test_bf16_needs_a_device_that_has_it(tmp_path):
    value = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [1], [1.0])
    graph = onnx.helper.make_graph([], "g", [], [], [value])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    found = older_runtimes_of(tmp_path / "m.onnx")
    assert found["onnxruntime"].endswith(", on devices that it has operators in bf16 for")


@pytest.mark.parametrize("opset", [17, 24])
def test_opsets_that_are_not_made(opset):
    with pytest.raises(fa.InputError, match=rf"opset is {opset}; expected .*18 to 23"):
        BundleSettings(opset=opset)


def test_the_command_line_takes_it(made, tmp_path, monkeypatch):
    from fastadapt import cli

    arguments = ["export", made / "run", "--out", tmp_path / "b", "--opset", "19", "--no-speed"]
    monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["model"]["opset"] == 19
    assert manifest["model"]["taken_by"]["onnxruntime"] == "1.15 or newer"
    assert "1.15 or newer" in (tmp_path / "b" / "report.html").read_text()
    assert {o.version for o in onnx.load(tmp_path / "b" / "model.onnx").opset_import} == {19}
