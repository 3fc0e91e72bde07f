import ctypes
import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import fastadapt as fa
from fastadapt.export import export_onnx
from fastadapt.export.backends import tensorrt
from fastadapt.export.bundle.verify_artefact import Reference, compare_runtime
from fastadapt.export.precision.half import MixedPrecision, precision_units
from fastadapt.export.runtime import usable_cores
from fastadapt.export.runtimes import RuntimeUnavailable, TensorRTRuntime, load_runtime
from fastadapt.export.settings import Batches

X = np.random.default_rng(0).random((5, 3, 4, 4), dtype=np.float32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).requires_grad_(False)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("runtimes") / "m.onnx"
    export_onnx(model, path, input_size=(3, 4, 4))
    return path


class TestOnnxRuntime:
    def test_arrays_and_tensors(self, model, path):
        runtime = load_runtime(path, device="cpu")
        assert (runtime.name, runtime.device) == ("ONNX Runtime, CPU", "cpu")
        assert runtime.providers == ("CPUExecutionProvider",)
        for batch in (1, 2, 5):
            want = model(torch.from_numpy(X[:batch])).numpy()
            array, tensor = runtime(X[:batch]), runtime(torch.from_numpy(X[:batch]))
            assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
            np.testing.assert_allclose(array, want, rtol=1e-5, atol=1e-6)
            assert np.array_equal(tensor.numpy(), array)
        assert np.array_equal(runtime(X[::2]), runtime(X[::2].copy()))

    def test_several_inputs(self, tmp_path):
        x, y, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2]) for n in "xyz")
        graph = helper.make_graph([helper.make_node("Sub", ["x", "y"], ["z"])], "g", [x, y], [z])
        opset = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "m.onnx")
        a, b = X[:, 0, 0, :2], X[:, 0, 1, :2]
        assert np.array_equal(load_runtime(tmp_path / "m.onnx", device="cpu")(a, b), a - b)

    def test_a_cuda_provider_that_does_not_load(self, path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
        if load_runtime(path).device == "cuda":
            pytest.skip("it does load")
        assert load_runtime(path)(X).shape == (5, 3)
        # The reason is the linker's, on a machine without a driver this one.
        with pytest.raises(RuntimeUnavailable, match=r"does not load here: lib\S+: cannot") as e:
            load_runtime(path, device="cuda")
        assert "\n" not in str(e.value)

    def test_a_gpu_that_fails_is_no_run_on_the_cpu(self, path):
        session = load_runtime(path, device="cpu")._session(None)
        assert session._enable_fallback is False

    def test_threads(self, path, monkeypatch):
        assert load_runtime(path, device="cpu").threads == usable_cores() >= 1
        runtime = load_runtime(path, device="cpu", threads=3)
        assert runtime._session(None).get_session_options().intra_op_num_threads == 3

    def test_a_shape_that_does_not_fit_is_one_line(self, path):
        with pytest.raises(fa.InputError, match="ONNX Runtime, CPU fails at batch size 5: ") as e:
            load_runtime(path, device="cpu")(X[:, :, :3])
        assert "\n" not in str(e.value)


class TestRefused:
    def test_files(self, tmp_path):
        with pytest.raises(fa.InputError, match=r"m\.onnx does not exist"):
            load_runtime(tmp_path / "m.onnx")
        for name in ("m.onnx", "m.zip"):
            (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(fa.InputError, match=r"ONNX Runtime cannot load m\.onnx"):
            load_runtime(tmp_path / "m.onnx")
        with pytest.raises(fa.InputError, match=r"expected \.onnx, \.pt2, \.engine"):
            load_runtime(tmp_path / "m.zip")

    def test_device(self, path):
        with pytest.raises(fa.InputError, match="device is 'tpu'; expected one of auto"):
            load_runtime(path, device="tpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_gpu(self, path, tmp_path):
        with pytest.raises(RuntimeUnavailable, match="there is no GPU"):
            load_runtime(path, device="cuda")
        (tmp_path / "m.engine").write_bytes(b"plan")
        (tmp_path / "m.engine.json").write_text(json.dumps(ENGINE))
        with pytest.raises(RuntimeUnavailable, match=r"needs a GPU \(sm_89\)"):
            load_runtime(tmp_path / "m.engine")


ENGINE = {
    "kind": "tensorrt_rtx",
    "library": "TensorRT-RTX",
    "version": "1.7",
    "targets": ["sm_89"],
    "inputs": [{"name": "images"}],
    "outputs": [{"name": "logits"}],
}


class FakeEngine:
    """Doubles its input, up to a batch of 4: what of TensorRT's runtime an engine needs."""

    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None})
    EngineValidity = SimpleNamespace(INVALID="invalid", VALID="valid")
    __version__, __name__ = "1.7", "fake_rtx"

    def Runtime(self, log):
        return SimpleNamespace(
            get_engine_validity=lambda plan: ("valid" if plan == b"plan" else "invalid", 0),
            deserialize_cuda_engine=lambda plan: self,
        )

    def create_execution_context(self):
        self.address = {}
        return self

    def set_input_shape(self, name, shape):
        self.shape = shape
        return shape[0] <= 4

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.address[name] = address

    def execute_async_v3(self, stream):
        count = int(np.prod(self.shape))
        x, *outputs = (
            np.ctypeslib.as_array(
                ctypes.cast(self.address[n], ctypes.POINTER(ctypes.c_float)), (count,)
            )
            for n in ("images", *(n for n in self.address if n != "images"))
        )
        for factor, y in enumerate(outputs, 2):
            y[:] = factor * x
        return True


class TestTensorRT:
    """The calls of the engine runner, without a GPU."""

    @pytest.fixture
    def file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (8, 9))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H100")
        stream = SimpleNamespace(cuda_stream=0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(TensorRTRuntime, "device", "cpu")
        flavour = tensorrt.Flavour("tensorrt_rtx", FakeEngine())
        monkeypatch.setattr(tensorrt, "load_flavour", lambda kind: flavour)
        (tmp_path / "m.engine").write_bytes(b"plan")
        (tmp_path / "m.engine.json").write_text(json.dumps(ENGINE))
        return tmp_path / "m.engine"

    def test_runs(self, file):
        runtime = load_runtime(file)
        assert (runtime.name, runtime.providers) == ("TensorRT-RTX", ("TensorRT-RTX",))
        x = X[:4, 0, 0]
        assert np.array_equal(runtime(x), 2 * x)
        with pytest.raises(fa.InputError, match=r"batch size 5: .*outside the engine's profile"):
            runtime(X[:, 0, 0])

    def test_an_output_of_each_task(self, file):
        outputs = [{"name": "grade"}, {"name": "artifact"}]
        file.with_name("m.engine.json").write_text(json.dumps({**ENGINE, "outputs": outputs}))
        x = X[:4, 0, 0]
        grade, artifact = load_runtime(file).outputs(x)
        assert np.array_equal(grade, 2 * x) and np.array_equal(artifact, 3 * x)

    def test_not_for_this_gpu(self, file, monkeypatch):
        file.write_bytes(b"other")
        with pytest.raises(RuntimeUnavailable, match="is not for this GPU, or not for"):
            load_runtime(file)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
        with pytest.raises(RuntimeUnavailable, match=r"does not run on NVIDIA H100 .*9\.0"):
            load_runtime(file)

    def test_not_installed(self, file, monkeypatch):
        monkeypatch.setattr(tensorrt, "load_flavour", lambda kind: None)
        with pytest.raises(RuntimeUnavailable, match="TensorRT-RTX is not installed here"):
            load_runtime(file)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this ONNX Runtime has no CUDA provider",
)
class TestGpu:
    @pytest.mark.parametrize("cuda_graph", [False, True])
    def test_onnx_runtime(self, model, path, cuda_graph):
        runtime = load_runtime(path, device="cuda", cuda_graph=cuda_graph)
        assert runtime.providers[0] == "CUDAExecutionProvider"
        for _ in range(2):  # the second call replays
            for batch in (1, 4, 5):
                x = torch.from_numpy(X[:batch])
                got = runtime(x.cuda())
                assert got.device.type == "cuda"
                torch.testing.assert_close(got.cpu(), model(x), rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(runtime(X[:batch]), model(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("cuda_graph", [False, True])
    def test_a_folded_adapter_passes_the_gate(self, tmp_path, cuda_graph):
        torch.manual_seed(0)
        config = fa.AdaptConfig(rank=16, num_centers=5, input_size=(3, 32, 32))
        backbone = nn.Conv2d(3, 64, 8, stride=8)
        model = fa.adapt(backbone, config, num_classes=3).eval().requires_grad_(False)
        folded = fa.fold(model)
        units = precision_units(folded, torch.rand(1, 3, 32, 32))
        half = MixedPrecision(folded, torch.float16, units)
        export_onnx(half, tmp_path / "m.onnx", input_size=(3, 32, 32))
        runtime = load_runtime(tmp_path / "m.onnx", device="cuda", cuda_graph=cuda_graph)
        x = np.random.default_rng(0).random((16, 3, 32, 32), dtype=np.float32)
        expected = model(torch.from_numpy(x)).numpy()
        batches = Batches(1, 8, 64)
        reference = Reference({"images": x}, expected)
        found = compare_runtime(runtime, reference, batches, precision="fp16")
        assert [parity.batch for parity in found] == [1, 5, 8, 64]
        assert [parity.problems for parity in found] == [()] * 4
