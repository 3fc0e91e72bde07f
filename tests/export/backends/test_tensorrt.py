import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_onnx
from fastadapt.export.backends import tensorrt
from fastadapt.export.backends.tensorrt import (
    EngineConfig,
    Flavour,
    build_engine,
    choose_flavour,
    parse_layers,
    summarize,
)
from fastadapt.export.graph_input import GraphInput
from fastadapt.export.precision.half import DTYPES, MixedPrecision, precision_units
from fastadapt.export.settings import Batches

trt_rtx = pytest.importorskip("tensorrt_rtx")
SIZE = {"vit": 32, "swin": 56, "convnext": 64, "efficientnet": 64}
BATCH = Batches(1, 4, 8)


def make_folded(name):
    torch.manual_seed(0)
    backbone = {
        "vit": lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3
        ),
        "swin": lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=56,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(1, 2),
        ),
        "convnext": lambda: timm.create_model("test_convnext", depths=(1, 1, 1, 1)),
        "efficientnet": lambda: timm.create_model("test_efficientnet"),
    }[name]()
    config = fa.AdaptConfig(rank=8, num_centers=3, input_size=(3, SIZE[name], SIZE[name]))
    return fa.fold(fa.adapt(backbone, config, num_classes=4))


def write_graph(folded, path, size, precision="fp32"):
    module = folded
    if precision != "fp32":
        units = precision_units(folded, torch.rand(1, 3, size, size))
        module = MixedPrecision(folded, DTYPES[precision], units)
    graph_input = GraphInput(Preprocess((3, size, size)))
    opset = 22 if precision == "bf16" else 20
    export_onnx(module, path, input_size=(3, size, size), graph_input=graph_input, opset=opset)
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return write_graph(make_folded("vit"), tmp_path_factory.mktemp("trt") / "m.onnx", 32)


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(tensorrt, "gpu", lambda: ("NVIDIA H100", (9, 0)))


def installed(monkeypatch, *kinds):
    """As if these libraries were installed."""
    modules = {"tensorrt_rtx": trt_rtx, "tensorrt": SimpleNamespace(__version__="10.13")}
    found = {kind: Flavour(kind, modules[kind]) for kind in kinds}
    monkeypatch.setattr(tensorrt, "load_flavour", found.get)


class TestBuild:
    """Engines that TensorRT-RTX really builds, for GPUs that are not here."""

    @pytest.mark.parametrize("name", SIZE)
    def test_backbones(self, tmp_path, name):
        folded = make_folded(name)
        for precision in ("fp32", "fp16"):
            path = tmp_path / f"m.{precision}.engine"
            onnx = write_graph(folded, tmp_path / f"{precision}.onnx", SIZE[name], precision)
            config = EngineConfig(BATCH, targets=("sm_89", "sm_120"))
            details = build_engine(onnx, path, config, precision=precision)
            assert path.stat().st_size > 10_000
            assert json.loads(Path(f"{path}.json").read_text()) == details
            assert details["inputs"] == [
                {"name": "images", "dtype": "uint8", "shape": ["batch", SIZE[name], SIZE[name], 3]}
            ]
            assert details["outputs"][0]["dtype"] == "fp32"
            assert details["targets"] == ["sm_89", "sm_120"]
            assert details["batch"] == {"min": 1, "opt": 4, "max": 8}
            counts = {}
            for kind in details["summary"]["precision"].values():
                for dtype, count in kind.items():
                    counts[dtype] = counts.get(dtype, 0) + count
            if precision == "fp32":
                assert "fp16" not in counts
                assert details["summary"]["fp32"] == []
            else:
                assert counts["fp16"] > counts["fp32"]
                assert 0 < len(details["summary"]["fp32"]) < 15
            assert details["summary"]["fused"]
        assert sorted(p.suffix for p in tmp_path.iterdir()) == sorted(
            2 * [".engine", ".json", ".onnx"]
        )

    def test_bf16_and_every_target_if_none_is_named(self, tmp_path):
        onnx = write_graph(make_folded("vit"), tmp_path / "m.onnx", 32, "bf16")
        details = build_engine(onnx, tmp_path / "m.engine", EngineConfig(BATCH), precision="bf16")
        assert {"sm_80", "sm_89", "sm_120"} <= set(details["targets"])
        assert "sm_75" not in details["targets"]
        assert details["summary"]["precision"]["correlation"] == {"bf16": 1}

    def test_a_second_input(self, tmp_path):
        class Model(torch.nn.Module):
            def forward(self, images, features):
                return images.flatten(1)[:, :8] * features

        onnx = tmp_path / "m.onnx"
        export_onnx(Model(), onnx, input_size=(3, 4, 4), other_inputs={"domain": (8,)})
        details = build_engine(onnx, tmp_path / "m.engine", EngineConfig(BATCH, ("sm_89",)))
        assert [value["name"] for value in details["inputs"]] == ["images", "domain"]

    def test_workspace(self, graph, tmp_path):
        config = EngineConfig(BATCH, ("sm_89",), workspace=256)
        assert build_engine(graph, tmp_path / "m.engine", config)["workspace"] == 256

    def test_progress_grows_to_the_end(self, graph, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "rich.progress.Progress.update", lambda self, task, completed: seen.append(completed)
        )
        build_engine(graph, tmp_path / "m.engine", EngineConfig(BATCH, ("sm_89",)))
        assert seen == sorted(seen)
        assert 0 < seen[0] < 0.5
        assert seen[-1] == 1

    def test_ctrl_c_ends_it(self, graph, tmp_path, monkeypatch):
        def interrupt(self, task, completed):
            raise KeyboardInterrupt

        monkeypatch.setattr("rich.progress.Progress.update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_engine(graph, tmp_path / "m.engine", EngineConfig(BATCH, ("sm_89",)))
        assert list(tmp_path.iterdir()) == []


class TestRefused:
    def test_nothing_installed(self, monkeypatch):
        installed(monkeypatch)
        with pytest.raises(fa.InputError, match=r"neither .*pip install 'fastadapt\[trt-rtx\]'"):
            choose_flavour(EngineConfig())

    def test_rtx_on_hopper(self, monkeypatch, h100):
        installed(monkeypatch, "tensorrt_rtx")
        with pytest.raises(fa.InputError, match=r"does not run on .*H100.*9\.0.*fastadapt\[trt\]"):
            choose_flavour(EngineConfig())
        # For another machine it builds there, too.
        assert choose_flavour(EngineConfig(targets=("sm_89",))).kind == "tensorrt_rtx"

    def test_tensorrt_serves_the_gpu_at_hand_only(self, monkeypatch, h100):
        installed(monkeypatch, "tensorrt", "tensorrt_rtx")
        assert choose_flavour(EngineConfig()).kind == "tensorrt"
        assert choose_flavour(EngineConfig(targets=("sm_89",))).kind == "tensorrt_rtx"
        installed(monkeypatch, "tensorrt")
        with pytest.raises(fa.InputError, match=r"`targets` names GPUs.*TensorRT-RTX"):
            choose_flavour(EngineConfig(targets=("sm_89",)))
        monkeypatch.setattr(tensorrt, "gpu", lambda: None)
        with pytest.raises(fa.InputError, match="there is no GPU here"):
            choose_flavour(EngineConfig())

    def test_a_target_that_it_does_not_know(self):
        with pytest.raises(fa.InputError, match=r"targets is 'sm_90'.*sm_89, sm_120"):
            choose_flavour(EngineConfig(targets=("sm_90",)))

    @pytest.mark.parametrize("flag", ["hardware_compatible", "version_compatible"])
    def test_compatible_engines_are_tensorrts(self, flag):
        with pytest.raises(fa.InputError, match=r"`\w+_compatible` is TensorRT's"):
            choose_flavour(EngineConfig(**{flag: True}))

    def test_a_graph_that_it_cannot_read(self, tmp_path):
        (tmp_path / "m.onnx").write_bytes(b"junk")
        with pytest.raises(fa.InputError, match=r"TensorRT-RTX .* cannot read m\.onnx: \w+"):
            build_engine(tmp_path / "m.onnx", tmp_path / "m.engine")

    def test_a_full_disk_leaves_nothing(self, graph, tmp_path, monkeypatch):
        def full(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            build_engine(graph, tmp_path / "m.engine", EngineConfig(BATCH, ("sm_89",)))
        assert list(tmp_path.iterdir()) == []


def test_a_kill_while_it_writes_leaves_no_engine(graph, tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from fastadapt.export.backends import tensorrt\n"
        "write = Path.write_bytes\n"
        "def slow(path, data): write(path, bytes(data)[:100]); time.sleep(600)\n"
        "Path.write_bytes = slow\n"
        "tensorrt.build_engine(sys.argv[1], sys.argv[2])"
    )
    args = [sys.executable, "-c", code, str(graph), str(tmp_path / "m.engine")]
    process = subprocess.Popen(args)
    try:
        deadline = time.monotonic() + 300
        while not any(p.stat().st_size for p in tmp_path.iterdir()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait(300)
    finally:
        process.kill()
    assert not (tmp_path / "m.engine").exists()


LAYERS = """Layers:
Name: gemm_1, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [-1,4], Datatype: Half, Format: x }], Constants: [ { Name: w, Datatype: Half }], Outputs: [ { Name: b, Dimensions: [-1,4], Datatype: Half }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_a][ONNX Layer: node_b]
Name: stats, LayerType: kgen, Inputs: [ { Name: b, Datatype: Half }, { Name: c, Datatype: Float }], Outputs: [ { Name: d, Datatype: Float }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_norm]
Name: shape, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Bindings:
"""  # noqa: E501


def test_layer_list():
    layers = parse_layers(LAYERS)
    assert [layer["name"] for layer in layers] == ["gemm_1", "stats", "shape"]
    assert layers[1]["inputs"] == ["fp16", "fp32"]
    assert layers[0]["onnx"] == ["node_a", "node_b"]
    summary = summarize(layers, "fp16")
    assert summary["precision"] == {
        "gemm": {"fp16": 1},
        "kgen": {"fp32": 1},
        "shape_call": {"none": 1},
    }
    assert summary["fused"] == {"gemm_1": ["node_a", "node_b"]}
    assert [layer["name"] for layer in summary["fp32"]] == ["stats"]
    assert summarize(layers, "fp32")["fp32"] == []


class FakeTensorRT:
    """Of TensorRT 10 and 11 what differs from TensorRT-RTX: flags, timing cache, inspector."""

    __name__ = "tensorrt"
    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None})
    IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere+")
    BuilderFlag = SimpleNamespace(TF32="tf32", VERSION_COMPATIBLE="version")
    LayerInformationFormat = SimpleNamespace(ONELINE="oneline")

    def __init__(self, version):
        self.__version__ = version
        flags = {"STRONGLY_TYPED": 1} if version.startswith("10") else {}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
        self.calls = {}
        tensor = SimpleNamespace(name="images", shape=(-1, 3), dtype=SimpleNamespace(name="HALF"))
        self.network = SimpleNamespace(
            num_inputs=1,
            num_outputs=1,
            get_input=lambda i: tensor,
            get_output=lambda i: tensor,
        )

    def note(self, name, result=None):
        return lambda *args, **kwargs: (
            self.calls.update({name: (*args, *kwargs.values())}) or result
        )

    def OnnxParser(self, network, log):
        return SimpleNamespace(parse_from_file=lambda path: True)

    def Builder(self, log):
        self.config = SimpleNamespace(
            clear_flag=self.note("clear"),
            set_flag=self.note("flag"),
            set_memory_pool_limit=self.note("limit"),
            add_optimization_profile=self.note("profile"),
            create_timing_cache=self.note("cache", SimpleNamespace(serialize=lambda: b"times")),
            set_timing_cache=self.note("set cache"),
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"times"),
        )
        return SimpleNamespace(
            create_network=self.note("network", self.network),
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=self.note("shape")),
            build_serialized_network=lambda network, config: b"plan",
        )

    def Runtime(self, log):
        inspector = SimpleNamespace(get_engine_information=lambda format: LAYERS)
        engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)


@pytest.mark.parametrize("version,flags", [("10.13.3", 2), ("11.1.0", 0)])
def test_tensorrt_10_and_11(tmp_path, monkeypatch, version, flags):
    monkeypatch.setattr(tensorrt, "gpu", lambda: ("NVIDIA H100", (9, 0)))
    monkeypatch.setattr(tensorrt, "_loggers", {})
    trt = FakeTensorRT(version)
    cache = tmp_path / "cache" / "times"
    config = EngineConfig(
        BATCH, workspace=64, hardware_compatible=True, version_compatible=True, timing_cache=cache
    )
    (tmp_path / "m.onnx").write_bytes(b"graph")
    build = lambda: build_engine(  # noqa: E731
        tmp_path / "m.onnx", tmp_path / "m.engine", config, flavour=Flavour("tensorrt", trt)
    )
    details = build()
    assert (tmp_path / "m.engine").read_bytes() == b"plan"
    assert trt.calls["network"] == (flags,)
    assert trt.calls["shape"] == ("images", (1, 3), (4, 3), (8, 3))
    assert trt.calls["limit"] == ("workspace", 64 << 20)
    assert trt.calls["flag"] == ("version",)
    assert trt.calls["clear"] == ("tf32",)
    assert trt.config.hardware_compatibility_level == "ampere+"
    assert not hasattr(trt.config, "num_compute_capabilities")
    assert (details["library"], details["version"]) == ("TensorRT", version)
    assert details["targets"] == ["sm_90"]
    assert details["summary"]["layers"] == 3
    assert trt.calls["cache"] == (b"",)
    assert cache.read_bytes() == b"times"
    build()
    assert trt.calls["cache"] == (b"times",)
