"""Q/DQ graphs, and the engines that TensorRT-RTX builds of them."""

import numpy as np
import onnx
import pytest

import fastadapt as fa
from fastadapt.export import EngineOptions
from fastadapt.export.artefact import FAILED, REFUSED, UNVERIFIED, VERIFIED
from fastadapt.export.backends.opsets import older_runtimes_of
from fastadapt.export.bundle import build
from fastadapt.export.bundle.build import build_artefacts
from fastadapt.export.precision.int8 import Judgement
from fastadapt.export.precision.qdq import check_fp8, write_qdq
from fastadapt.export.runtimes import load_runtime
from fastadapt.export.settings import Batches

TYPES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}


def batches(model):
    """Two, of which the last is smaller."""
    images = model.images()
    return iter([images.read(images.calibration[:5]), images.read(images.calibration[5:])])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_graph(calibrated, precision):
    path = calibrated.folder / "q.onnx"
    write_qdq(calibrated.onnx, path, batches(calibrated), precision)
    model = onnx.load(path)
    assert {opset.domain for opset in model.opset_import} == {""}
    dtypes = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    quantized = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantized) >= 8
    zeros = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in quantized:  # symmetric, and of the precision that was asked for
        assert dtypes[node.input[2]] == TYPES[precision]
        assert not np.frombuffer(zeros[node.input[2]].raw_data or b"\0", np.uint8).any()
    read = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    of_weights = [n for n in read if dtypes.get(n.input[0]) == TYPES[precision]]
    assert of_weights
    scales = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in zeros.values()
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    sizes = {scales[n.input[1]].size for n in of_weights}
    assert max(sizes) > 1 if precision == "int8" else sizes == {1}
    # Biases stay as they are: TensorRT reads no INT32.
    assert onnx.TensorProto.INT32 not in {dtypes.get(n.input[0]) for n in read}
    expected = calibrated.reference.expected
    found = load_runtime(path, device="cpu")(calibrated.reference.inputs["images"])
    assert np.abs(found - expected).max() < 0.5 * np.ptp(expected, axis=0).max()
    left = {file.name for file in calibrated.folder.iterdir()}
    assert left == {"model.onnx", "q.onnx"}
    assert older_runtimes_of(path) == {
        "onnxruntime": "1.17 or newer",
        "tensorrt": "10.3 or newer",
    }


def test_nothing_to_quantise(calibrated, tmp_path):
    import torch
    from torch import nn

    from fastadapt.export import export_onnx

    path = tmp_path / "pool.onnx"
    export_onnx(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), path, input_size=(3, 8, 8))
    images = iter([torch.rand(2, 3, 8, 8).numpy()])
    with pytest.raises(fa.InputError, match=r"pool\.onnx has nothing that fp8 could compute"):
        write_qdq(path, tmp_path / "q.onnx", images, "fp8")
    assert not (tmp_path / "q.onnx").exists()


def test_runtimes_that_do_not_work_with_this_onnx(tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnx, "__version__", "1.23.2")
    for older in ("1.22.1", "1.23.2"):
        monkeypatch.setattr(onnxruntime, "__version__", older)
        said = rf"that of {older} does not work with onnx 1\.23\.2: install onnxruntime 1\.24 or"
        with pytest.raises(fa.InputError, match=said):
            check_fp8()
        with pytest.raises(fa.InputError, match=said):
            write_qdq(tmp_path / "none.onnx", tmp_path / "q.onnx", iter(()), "fp8")
    monkeypatch.setattr(onnx, "__version__", "1.18.0")
    check_fp8()
    monkeypatch.setattr(onnxruntime, "__version__", "1.100.0")
    monkeypatch.setattr(onnx, "__version__", "1.23.2")
    check_fp8()


class TestEngines:
    """Built for real; what runs and is refused there stands in for a GPU."""

    options = EngineOptions(
        trt=True, int8=True, fp8=True, batch=Batches(1, 2, 4), targets=("sm_89",)
    )

    def test_both_precisions(self, calibrated):
        pytest.importorskip("tensorrt_rtx")
        found = {a.path: a for a in build_artefacts(self.options, calibrated)}
        assert list(found) == [
            "model.onnx",
            "model.fp32.engine",
            "model.int8.onnx",
            "model.int8.engine",
            "model.fp8.onnx",
            "model.fp8.engine",
        ]
        for precision in ("int8", "fp8"):
            graph, engine = found[f"model.{precision}.onnx"], found[f"model.{precision}.engine"]
            assert (graph.status, engine.status) == (UNVERIFIED, UNVERIFIED)
            assert "for TensorRT; in ONNX Runtime agreement" in graph.reason
            assert engine.details["onnx"] == graph.path
            assert engine.details["judgement"]["speed"] is None
            counted = engine.details["summary"]["precision"].values()
            assert sum(kinds.get(precision, 0) for kinds in counted) > 0
        assert {file.name for file in calibrated.folder.iterdir()} == {
            name for artefact in found.values() for name in artefact.files
        }

    def test_an_inaccurate_graph_is_refused(self, calibrated, monkeypatch):
        def wrong(onnx_file, path, images, precision, calibration):
            model = onnx.load(onnx_file)
            for weight in model.graph.initializer:
                if weight.name.endswith("head.bias"):
                    values = onnx.numpy_helper.to_array(weight) + np.array([9, 0, 0, 0])
                    weight.CopyFrom(
                        onnx.numpy_helper.from_array(values.astype(np.float32), weight.name)
                    )
            onnx.save(model, path)

        monkeypatch.setattr(build, "write_qdq", wrong)
        built = []
        monkeypatch.setattr(build, "_build_engine", lambda *args: built.append(args))
        (graph,) = build._build_eight_bit_engine(
            self.options, calibrated, "int8", build.Console(quiet=True)
        )
        assert (graph.status, graph.path, built) == (REFUSED, None, [])
        assert "agreement falls from 100.00%" in graph.reason
        assert [file.name for file in calibrated.folder.iterdir()] == ["model.onnx"]

    @pytest.mark.parametrize("status,problem", [(VERIFIED, "not faster"), (FAILED, "error 2")])
    def test_an_engine_that_is_not_worth_it_is_refused(
        self, calibrated, monkeypatch, status, problem
    ):
        def engine(options, folded, variant, console):
            path = folded.path(variant.precision, "engine")
            path.write_bytes(b"plan")
            found = build.describe_artefact("tensorrt", path, variant.precision, variant.notes)
            return build.replace(found, status=status, reason="error 2 of the spread")

        def judge(fp32, quantized, images, *, rival, **settings):
            assert rival[1].name == "model.fp32.engine"
            return Judgement(
                1.0, 1.0, 0.01, 10, 20, 2, 8, "accuracy", "TensorRT", problems=("not faster",)
            )

        calibrated.path("fp32", "engine").write_bytes(b"plan")
        monkeypatch.setattr(build, "_build_engine", engine)
        monkeypatch.setattr(build, "judge", judge)
        (refused,) = build._build_eight_bit_engine(
            self.options, calibrated, "int8", build.Console(quiet=True)
        )
        assert (refused.status, refused.path) == (REFUSED, None)
        assert problem in refused.reason
        left = {file.name for file in calibrated.folder.iterdir()}
        assert left == {"model.onnx", "model.fp32.engine"}
