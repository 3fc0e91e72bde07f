"""FP8 on a CPU, where PyTorch computes the same products: layer, calibration, .pt2, judgement."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import EngineOptions
from fastadapt.export.artefact import REFUSED, VERIFIED
from fastadapt.export.backends.aotinductor import build_aoti, target
from fastadapt.export.bundle import build as engines
from fastadapt.export.bundle.build import build_artefacts
from fastadapt.export.graph_input import Deployed, GraphInput
from fastadapt.export.precision import fp8
from fastadapt.export.precision import int8 as quantize
from fastadapt.export.precision.fp8 import E4M3, LARGEST, Float8Linear, quantize_fp8
from fastadapt.export.precision.half import MixedPrecision, precision_units
from fastadapt.export.precision.int8 import Judgement, QuantizationImages
from fastadapt.export.runtimes import load_runtime
from fastadapt.export.settings import Batches
from tests.helpers.compilers import build_or_skip

SIZE = (3, 64, 64)
OPTIONS = EngineOptions(aoti=True, fp8=True, precision="bf16", batch=Batches(2, 4, 6))


def make_model(**options):
    """A small ViT with an adapter: the fp32 model behind its input, and its half in bf16."""
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    config = fa.AdaptConfig(rank=16, num_centers=3, input_size=SIZE)
    folded = fa.fold(fa.adapt(vit, config, num_classes=4))
    units = precision_units(folded, torch.rand(1, *SIZE))
    return deployed(folded), MixedPrecision(folded, torch.bfloat16, units, **options).eval()


def deployed(module):
    return Deployed(module, GraphInput(Preprocess(SIZE)))


def make_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 5, 5, generator=generator) * torch.rand(count, 3, 1, 1)
    images = nn.functional.interpolate(small, SIZE[1:], mode="bilinear")
    return (255 * images).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def off(got, want):
    """Root mean square error of the first outputs, of the spread of all."""
    return ((got - want[: len(got)]).square().mean() / want.var(dim=0).mean()).sqrt()


def with_images(folded, folder):
    """A folded in a folder of its own, with images for FP8: those of its gate."""
    (folder / "model.onnx").write_bytes(folded.onnx.read_bytes())
    array = folded.reference.inputs["images"]
    rows = list(range(len(array)))
    images = QuantizationImages(rows, rows, None, lambda files: array[list(files)])
    return replace(folded, folder=folder, onnx=folder / "model.onnx", images=lambda: images)


class TestLayer:
    @pytest.mark.parametrize("shape", [(5, 7, 32), (1, 1, 32), (2, 3, 3, 32), (9, 32)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_is_the_product_of_rounded_factors(self, shape, bias):
        torch.manual_seed(0)
        layer = nn.Linear(32, 48, bias=bias)
        x = torch.randn(shape).to(torch.bfloat16)
        quantized = Float8Linear(layer, float(x.abs().max()))
        got = quantized(x)
        assert (got.dtype, got.shape) == (torch.bfloat16, (*shape[:-1], 48))

        def rounded(values):
            scale = values.abs().max().double() / LARGEST
            return (values.double() / scale).float().to(E4M3).double() * scale

        want = rounded(x) @ rounded(layer.weight).T
        want = want if layer.bias is None else want + layer.bias.to(torch.bfloat16).double()
        assert (got.double() - want).abs().max() < 2**-7 * want.abs().max()
        exact = layer(x.float())
        assert (got - exact).square().mean().sqrt() < 0.05 * exact.std()

    def test_larger_inputs_are_cut_off(self):
        layer = nn.Linear(16, 16, bias=False)
        nn.init.eye_(layer.weight)
        x = torch.tensor([[-1e30, 3.0, 0.5, *[0.0] * 13]])
        assert Float8Linear(layer, 2.0)(x)[0, :4].tolist() == [-2.0, 2.0, 0.5, 0.0]

    def test_of_zeros(self):
        layer = nn.Linear(16, 32)
        nn.init.zeros_(layer.weight)
        got = Float8Linear(layer, 0.0)(torch.zeros(2, 3, 16))
        assert torch.equal(got, layer.bias.to(torch.bfloat16).expand(2, 3, 32))


class TestQuantize:
    def test_which_layers_and_their_ranges(self):
        keep = ["backbone.blocks.1.mlp.fc2"]
        _, half = make_model(keep=keep)
        images = make_images(6)
        seen = []
        layer = half.model.get_submodule("backbone.blocks.0.mlp.fc1")
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
        with torch.no_grad():
            deployed(half)(images)
        quantized, ranges = quantize_fp8(half, images.split(2), deployed)
        parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        names = [f"backbone.blocks.{block}.{part}" for block in (0, 1) for part in parts]
        adapter = ["adapter.blocks.0.mlp.fc1", "adapter.blocks.0.mlp.fc2"]
        assert sorted(ranges) == sorted({*names, *adapter} - {*keep})
        assert ranges["backbone.blocks.0.mlp.fc1"] == max(seen)
        found = [n for n, m in quantized.model.named_modules() if isinstance(m, Float8Linear)]
        assert sorted(found) == sorted(ranges)
        assert quantized.model.get_submodule(keep[0]).weight.dtype == torch.float32
        # What was given is as it was.
        assert not any(isinstance(m, Float8Linear) for m in half.modules())
        assert len(layer._forward_pre_hooks) == 2

    def test_errors(self):
        exact, half = make_model()
        images = make_images(16)
        quantized, _ = quantize_fp8(half, [make_images(16, seed=1)], deployed)
        with torch.no_grad():
            want, in_bf16, in_fp8 = (
                m(images) for m in (exact, deployed(half), deployed(quantized))
            )
        assert off(in_bf16, want) < 0.02
        assert off(in_bf16, want) < off(in_fp8, want) < 0.05

    def test_sizes_that_the_products_do_not_take(self):
        model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 32))
        half = MixedPrecision(model, torch.bfloat16, ["0", "1", "2"])
        assert list(quantize_fp8(half, [torch.rand(2, 3, 16)])[1]) == ["2"]
        assert quantize_fp8(half, [torch.rand(2, 16)])[1] == {}  # no tokens


@pytest.fixture(scope="module")
def made(folded_model, tmp_path_factory):
    """A folded, and its files: fp32, bf16 and FP8; on a GPU, for it."""
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() < fp8.CAPABILITY:
            pytest.skip("this GPU has no FP8")
    elif torch.__version__.startswith("2.11."):
        pytest.skip("what Inductor 2.11 writes in C++ for e4m3 does not compile")
    folded = with_images(folded_model, tmp_path_factory.mktemp("fp8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "speeds_in_turns", lambda runtimes, example: (10.0, 20.0))
        return folded, build_artefacts(replace(OPTIONS, fp8_budget=0.3), folded)


class TestArtefact:
    def test_accepted(self, made):
        *_, bf16, artefact = made[1]
        assert (bf16.path, bf16.status) == ("model.bf16.pt2", VERIFIED)
        assert (artefact.path, artefact.status) == ("model.fp8.pt2", VERIFIED)
        assert artefact.precision == "fp8"
        assert artefact.files == ("model.fp8.pt2", "model.fp8.pt2.json")
        assert artefact.details["targets"] == [
            target("cuda" if torch.cuda.is_available() else "cpu")
        ]
        assert len(artefact.details["fp8_layers"]) == 10
        judgement = artefact.details["judgement"]
        assert (judgement["rival"], judgement["speed"]) == ("bf16", 20.0)
        assert judgement["measured"] == "agreement"
        assert [parity.batch for parity in artefact.parity] == [2, 4, 5, 6]

    def test_runs_at_every_batch_size(self, made):
        folded, _ = made
        runtime = load_runtime(folded.folder / "model.fp8.pt2")
        images, want = (
            torch.from_numpy(folded.reference.inputs["images"]),
            torch.from_numpy(folded.reference.expected),
        )
        for batch in (2, 3, 6):
            assert off(runtime(images[:batch]).cpu(), want) < 0.1


class TestRefused:
    """Compiles nothing."""

    @pytest.fixture
    def folded(self, folded_model, tmp_path, monkeypatch):
        def build(model, example, path, batch, *, precision):
            path.write_bytes(b"code")
            path.with_name(f"{path.name}.json").write_text("{}")
            return {"batch": {"min": 2, "opt": 4, "max": 6}}

        def judge(fp32, quantized, images, *, budget, batch, rival, cuda_graph):
            assert (fp32.name, quantized.name) == ("model.onnx", "model.fp8.pt2")
            assert (rival[0], rival[1].name, batch) == ("bf16", "model.bf16.pt2", 4)
            figures = (0.8, 0.9, budget, 30, 20, batch, 100, "accuracy", "AOTInductor, CUDA")
            return Judgement(*figures, rival[0], problems=("accuracy falls",))

        monkeypatch.setattr(engines.aotinductor, "build_aoti", build)
        monkeypatch.setattr(
            engines, "verify_artefact", lambda _, found, *a, **k: replace(found, status=VERIFIED)
        )
        monkeypatch.setattr(engines, "judge", judge)
        return with_images(folded_model, tmp_path)

    def test_with_the_numbers(self, folded):
        artefact = build_artefacts(OPTIONS, folded)[-1]
        assert (artefact.path, artefact.status, artefact.files) == (None, REFUSED, ())
        assert (artefact.precision, artefact.reason) == ("fp8", "accuracy falls")
        assert artefact.details["judgement"]["accuracy_fp32"] == 0.9
        names = {path.name for path in folded.folder.iterdir()}
        assert "model.bf16.pt2" in names and not any("fp8" in name for name in names)

    def test_nothing_to_quantise(self, folded, monkeypatch):
        monkeypatch.setattr(fp8, "_candidates", lambda model: [])
        artefact = build_artefacts(OPTIONS, folded)[-1]
        assert artefact.status == REFUSED and "multiples of 16" in artefact.reason

    def test_no_classes(self, folded):
        with pytest.raises(fa.InputError, match="`fp8` is judged by its accuracy"):
            build_artefacts(
                OPTIONS, replace(folded, reference=replace(folded.reference, classes=False))
            )


class TestOptions:
    def test_needs_a_pt2_in_bf16(self):
        for options in ({"aoti": True}, {"precision": "bf16"}, {"aoti": True, "precision": "fp16"}):
            with pytest.raises(fa.InputError, match="add `aoti=True` `precision='bf16'`"):
                EngineOptions(fp8=True, **options).check()
        with pytest.raises(fa.InputError, match=r"fp8_budget is 2\.0"):
            EngineOptions(fp8_budget=2.0).check()

    def test_needs_a_gpu_that_has_it(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(fa.InputError, match=r"8\.9 or newer .* and there is none here: export"):
            OPTIONS.check()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        with pytest.raises(fa.InputError, match=r"and NVIDIA A100 has 8\.0: export"):
            OPTIONS.check()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        OPTIONS.check()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """One compilation for all that there is to ask."""
    if torch.cuda.get_device_capability() < fp8.CAPABILITY:
        pytest.skip("needs a GPU with FP8")
    exact, half = make_model()
    images = make_images(64).cuda()

    def on_gpu(module):
        return deployed(module).cuda()

    quantized, ranges = quantize_fp8(half.cuda(), [make_images(32, seed=1).cuda()], on_gpu)
    assert len(ranges) == 10
    model, path = on_gpu(quantized), tmp_path / "m.pt2"
    build_or_skip(build_aoti, model, (images[:1],), path, Batches(1, 8, 64), precision="fp8")
    with torch.no_grad():
        eager, want = model(images), exact.cuda()(images)
        on_cpu = deployed(quantized.cpu())(images.cpu()).cuda()
    assert off(eager, want) < 0.06
    assert off(eager, on_cpu) < 0.06
    for cuda_graph in (False, True):
        runtime = load_runtime(path, device="cuda", cuda_graph=cuda_graph)
        for batch in (1, 5, 64, 5):  # the last call replays
            got = runtime(images[:batch])
            assert off(got, eager) < 0.06
            assert off(got, want) < 0.06
