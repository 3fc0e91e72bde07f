import functools
import json
import sys

import numpy as np
import pytest
import timm
import torch

import fastadapt as fa
from fastadapt import cli
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_onnx, export_run, verify_bundle
from fastadapt.export.backends import tensorrt
from fastadapt.export.bundle import build as engines
from fastadapt.export.bundle.artefact import (
    FAILED,
    REFUSED,
    UNVERIFIED,
    VERIFIED,
    Artefact,
    Batches,
)
from fastadapt.export.bundle.build import (
    EngineOptions,
    Source,
    artefact_problems,
    build_artefacts,
    compare_runtime,
    rebuild_artefact,
    verify_artefact,
)
from fastadapt.export.bundle.graph_input import Deployed, GraphInput
from fastadapt.export.bundle.parity import GateError
from fastadapt.export.precision.int8 import Images, Judgement
from tests.export.test_pipeline import made  # noqa: F401

SIZE = (3, 32, 32)
GRAPH_INPUT = GraphInput(Preprocess(SIZE))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(scope="module")
def made_source(tmp_path_factory):
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3
    )
    model = fa.adapt(vit, fa.AdaptConfig(rank=8, num_centers=3, input_size=SIZE), 4).eval()
    pixels = torch.randint(0, 256, (8, *SIZE), dtype=torch.uint8)
    normalized = GRAPH_INPUT.preprocess.normalize(pixels)
    folder = tmp_path_factory.mktemp("engines")
    write_onnx = functools.partial(export_onnx, input_size=SIZE, graph_input=GRAPH_INPUT)
    folded = fa.fold(model)
    write_onnx(folded, folder / "model.onnx")
    with torch.no_grad():
        expected = model(normalized).numpy()

    def exact():
        with torch.no_grad():
            return model.double()(normalized.double()).float().numpy()

    return Source(
        folder=folder,
        onnx=folder / "model.onnx",
        onnx_parity=(),
        folded=folded,
        example=(normalized[:1],),
        inputs={"images": GRAPH_INPUT.array(pixels.numpy())},
        expected=expected,
        exact=exact,
        classes=True,
        write_onnx=write_onnx,
        deployed=lambda module: Deployed(module, GRAPH_INPUT),
        images=lambda: Images([], [], None, lambda files: np.empty(0)),
        speed=False,
    )


@pytest.fixture
def source(made_source, tmp_path):
    """In a folder of its own."""
    from dataclasses import replace

    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(made_source.onnx.read_bytes())
    return replace(made_source, folder=tmp_path, onnx=onnx)


class TestOptions:
    @pytest.mark.parametrize(
        "options,message",
        [
            ({"precision": "fp8"}, "--precision is 'fp8'; expected fp32, fp16 or bf16"),
            ({"targets": ("sm_89",)}, "--target is for TensorRT engines: add --trt"),
            ({"workspace": 4}, "--workspace is for TensorRT engines"),
            ({"workspace": -1, "trt": True}, "--workspace is -1; expected MiB"),
            ({"int8_budget": 2.0}, "the INT8 budget is 2.0"),
            ({"trt": True, "targets": ("sm_1",)}, "--target is 'sm_1'"),
        ],
    )
    def test_what_cannot_be_is_refused_before_any_work(self, options, message):
        with pytest.raises(fa.InputError, match=message):
            EngineOptions(**options).check()

    def test_the_command_line_refuses_before_it_loads(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(tensorrt, "load_flavour", lambda kind: None)
        args = ["fastadapt", "export", str(tmp_path / "none"), "--trt"]
        monkeypatch.setattr(sys, "argv", args)
        with pytest.raises(SystemExit):
            cli.main()
        assert "neither TensorRT nor TensorRT-RTX is installed" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


class TestBuild:
    def test_nothing_asked_for(self, source):
        (onnx,) = build_artefacts(EngineOptions(), source)
        assert (onnx.path, onnx.status, onnx.files) == ("model.onnx", VERIFIED, ("model.onnx",))

    @no_gpu
    def test_half_precision_and_an_engine(self, source):
        options = EngineOptions(
            trt=True, precision="fp16", batch=Batches(1, 2, 4), targets=("sm_89",)
        )
        onnx, half, engine = found = build_artefacts(options, source)
        assert artefact_problems(found) == []
        assert onnx.status == VERIFIED
        assert [p.batch for p in onnx.parity] == [1, 2, 3, 4]
        # In fp16 arithmetic it ran in PyTorch; what ONNX Runtime does on a CPU is fp32.
        assert (half.path, half.status) == ("model.fp16.onnx", UNVERIFIED)
        assert [p.stage for p in half.parity[:2]] == ["fp16 in PyTorch", "ONNX Runtime, CPU"]
        assert half.details["fp32_layers"] == []
        # What cannot run here is never called good.
        assert (engine.kind, engine.status) == ("tensorrt_rtx", UNVERIFIED)
        assert "needs a GPU (sm_89)" in engine.reason
        assert engine.files == ("model.fp16.engine", "model.fp16.engine.json")
        assert engine.details["onnx"] == "model.fp16.onnx"
        assert {p.name for p in source.folder.iterdir()} == {
            name for artefact in found for name in artefact.files
        }
        json.dumps([artefact.to_dict() for artefact in found])

    def test_a_wrong_half_graph_fails(self, source, monkeypatch):
        from dataclasses import replace

        def wrong(module, path, **kwargs):
            module.model.head.bias.data += torch.tensor([1.0, 0, 0, 0])
            return source.write_onnx(module, path, **kwargs)

        found = build_artefacts(EngineOptions(precision="fp16"), replace(source, write_onnx=wrong))
        assert found[1].status == FAILED
        assert artefact_problems(found)[0].startswith("model.fp16.onnx: at batch 1: error ")

    @no_gpu
    def test_an_engine_is_rebuilt_from_its_graph(self, source):
        options = EngineOptions(trt=True, batch=Batches(1, 2, 4), targets=("sm_120",))
        engine = build_artefacts(options, source)[-1]
        (source.folder / engine.path).write_bytes(b"of another machine")
        fresh = rebuild_artefact(source.folder, engine, source.inputs, source.expected)
        assert (source.folder / engine.path).stat().st_size > 10_000
        assert fresh.status == UNVERIFIED
        assert "sm_89" in fresh.details["targets"]
        assert fresh.details["batch"] == {"min": 1, "opt": 2, "max": 4}
        with pytest.raises(fa.InputError, match=r"model\.onnx cannot be rebuilt here"):
            onnx = Artefact("onnx", "model.onnx", "fp32", VERIFIED)
            rebuild_artefact(source.folder, onnx, source.inputs, source.expected)


class TestInt8:
    """The refusal; what the quantiser makes of a real model is in test_quantize.py."""

    def run(self, source, monkeypatch, problems):
        def quantize(onnx, path, images, device):
            path.write_bytes(onnx.read_bytes())

        judgement = Judgement(0.8, 0.9, 0.01, 30, 20, 8, 100, "accuracy", "ONNX Runtime, CPU")
        judgement = Judgement(**{**judgement.to_dict(), "problems": problems})
        monkeypatch.setattr(engines, "quantize_int8", quantize)
        monkeypatch.setattr(engines, "judge", lambda *args, **kwargs: judgement)
        return build_artefacts(EngineOptions(int8=True), source)[-1]

    def test_refused_with_the_numbers(self, source, monkeypatch):
        artefact = self.run(source, monkeypatch, ("accuracy falls",))
        assert (artefact.path, artefact.status, artefact.files) == (None, REFUSED, ())
        assert artefact.reason == "accuracy falls"
        assert artefact.details["judgement"]["accuracy_fp32"] == 0.9
        assert [p.name for p in source.folder.iterdir()] == ["model.onnx"]
        assert artefact_problems([artefact]) == []

    def test_accepted(self, source, monkeypatch):
        artefact = self.run(source, monkeypatch, ())
        assert (artefact.path, artefact.status) == ("model.int8.onnx", VERIFIED)

    def test_needs_classes(self, source):
        from dataclasses import replace

        with pytest.raises(fa.InputError, match="this model has no classes"):
            build_artefacts(EngineOptions(int8=True), replace(source, classes=False))


class FakeRuntime:
    name, device, providers = "fake", "cpu", ("fake",)

    def __init__(self, error=0.0):
        self.error, self.sizes = error, []

    def __call__(self, images):
        self.sizes.append(len(images))
        return images * 2 + self.error


class TestCompare:
    INPUTS = {"images": np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)}  # noqa: RUF012

    def test_full_batches_at_every_size(self):
        runtime = FakeRuntime()
        parities = compare_runtime(
            runtime, self.INPUTS, 2 * self.INPUTS["images"], Batches(2, 8, 16)
        )
        assert [(p.batch, p.samples, p.passed) for p in parities] == [
            (2, 6, True),
            (5, 10, True),
            (8, 8, True),
            (16, 16, True),
        ]
        assert runtime.sizes == [2, 2, 2, 5, 5, 8, 16]

    def test_fp64_decides_where_fp32_rounds(self):
        truth = 2 * self.INPUTS["images"]
        rounded = truth + 0.01
        batch, asked = Batches(1, 1, 1), []

        def exact():
            asked.append(1)
            return truth

        parities = compare_runtime(FakeRuntime(), self.INPUTS, rounded, batch, exact=exact)
        assert parities[0].passed and parities[0].stage == "fake, against fp64"
        assert compare_runtime(FakeRuntime(), self.INPUTS, rounded, batch)[0].problems
        parities = compare_runtime(FakeRuntime(0.05), self.INPUTS, rounded, batch, exact=exact)
        assert not parities[0].passed
        compare_runtime(FakeRuntime(), self.INPUTS, truth, batch, exact=exact)
        assert len(asked) == 2

    def test_limits_are_those_of_the_precision(self):
        expected = 2 * self.INPUTS["images"]
        runtime, batch = FakeRuntime(error=0.03), Batches(1, 1, 1)
        assert not compare_runtime(runtime, self.INPUTS, expected, batch)[0].passed
        assert compare_runtime(runtime, self.INPUTS, expected, batch, precision="fp16")[0].passed

    def test_a_file_that_does_not_load_fails(self, tmp_path):
        (tmp_path / "m.onnx").write_bytes(b"junk")
        artefact = Artefact("onnx", "m.onnx", "fp32", VERIFIED)
        found = verify_artefact(tmp_path, artefact, self.INPUTS, self.INPUTS["images"])
        assert found.status == FAILED
        assert "cannot load m.onnx" in found.reason


@no_gpu
class TestBundle:
    def test_engines_of_a_bundle(self, made, tmp_path, monkeypatch):  # noqa: F811
        bundle = tmp_path / "b"
        arguments = ["export", made / "run", "--out", bundle, "--trt", "--precision", "fp16"]
        arguments += ["--target", "sm_89,sm_120", "--batch", "1:2:4", "--no-speed"]
        monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        result = verify_bundle(bundle, speed=False)
        assert result.passed
        assert {a.path: a.status for a in result.artefacts} == {
            "model.onnx": VERIFIED,
            "model.fp16.onnx": UNVERIFIED,
            "model.fp16.engine": UNVERIFIED,
        }

    def test_what_fails_rejects_it(self, made, tmp_path, monkeypatch):  # noqa: F811
        def wrong(options, source, console):
            return [Artefact("onnx", "model.onnx", "fp32", FAILED, "at batch 4: error 1")]

        monkeypatch.setattr("fastadapt.export.bundle.pipeline.build_artefacts", wrong)
        with pytest.raises(GateError, match=r"rejected: model\.onnx: at batch 4"):
            export_run(made / "run", tmp_path / "b", speed=False)
        assert (tmp_path / "b.rejected").is_dir()
