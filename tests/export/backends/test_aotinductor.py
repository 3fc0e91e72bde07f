import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export.backends import aotinductor
from fastadapt.export.backends.aotinductor import build_aoti, check_compiler, target
from fastadapt.export.folded_layers import FoldedClusterAttention
from fastadapt.export.graph_input import Deployed, GraphInput
from fastadapt.export.precision.half import MixedPrecision, precision_units
from fastadapt.export.runtimes import RuntimeUnavailable, load_runtime
from fastadapt.export.settings import Batches
from tests.helpers.compilers import build_or_skip

# As on a machine that has PyTorch alone.
ELSEWHERE = """
import sys
sys.modules["fastadapt"] = None
import numpy as np, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
images = torch.from_numpy(np.load(sys.argv[2])).to(sys.argv[4])
np.save(sys.argv[3], torch.cat([model(images[:3]), model(images[3:4])]).cpu().numpy())
"""


def run_elsewhere(path, images, device):
    """The first images' logits, from a process of its own."""
    x, y = path.with_name("x.npy"), path.with_name("y.npy")
    np.save(x, images.cpu().numpy())
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(path), str(x), str(y), device],
        env={**os.environ, "TORCHINDUCTOR_VEC_ISA_OK": "1"},  # as README says
        check=True,
        timeout=500,
    )
    return torch.from_numpy(np.load(y))


def make_model():
    """A folded adapter in bf16 behind a uint8 input."""
    torch.manual_seed(0)
    config = fa.AdaptConfig(rank=4, num_centers=3, input_size=(3, 16, 16))
    folded = fa.fold(fa.adapt(nn.Conv2d(3, 8, 4, stride=4), config, num_classes=3))
    units = precision_units(folded, torch.rand(1, 3, 16, 16))
    half = MixedPrecision(folded, torch.bfloat16, units, keep=["head"])
    return Deployed(half, GraphInput(Preprocess((3, 16, 16))))


def make_images(count):
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model and its .pt2."""
    model, images = make_model(), make_images(7)
    path = tmp_path_factory.mktemp("aoti") / "m.pt2"
    details = build_aoti(model, (images[:1],), path, Batches(1, 4, 8), precision="bf16")
    return model, images, path, details


def test_loading_compiles_nothing(made, monkeypatch):
    from torch._inductor import cpu_vec_isa

    def compiles(*args):
        raise AssertionError("a compiler was called")

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", compiles)
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    load_runtime(made[2])
    # What it took for granted is forgotten again.
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0


def test_agrees_at_every_batch_size(made):
    model, images, path, _ = made
    runtime = load_runtime(path, cuda_graph=True)  # which a CPU has not
    assert (runtime.name, runtime.device) == ("AOTInductor, CPU", "cpu")
    with torch.no_grad():
        want = model(images)
    assert want.std() > 0.1
    for batch in (1, 2, 3, 7):
        got = runtime(images[:batch])
        assert (got - want[:batch]).abs().max() < 0.02 * want.std()
        assert np.array_equal(runtime(images[:batch].numpy()), got.numpy())


def test_runs_without_this_package(made):
    model, images, path, _ = made
    with torch.no_grad():
        want = model(images[:4])
    assert (run_elsewhere(path, images, "cpu") - want).abs().max() < 0.02 * want.std()


def test_says_what_it_is_for(made, tmp_path, monkeypatch):
    _, _, path, details = made
    assert json.loads(Path(f"{path}.json").read_text()) == details
    assert details["targets"] == [target("cpu")]
    assert details["inputs"] == [{"dtype": "uint8", "shape": ["batch", 16, 16, 3]}]
    for change, reason in (
        ({"targets": ["sm_90"]}, "compiled for sm_90"),
        ({"targets": ["cpu VSX"]}, "compiled for cpu VSX; this is cpu"),
        ({"version": "2.0.1"}, r"compiled by PyTorch 2\.0\.1"),
    ):
        copy = tmp_path / "m.pt2"
        copy.write_bytes(path.read_bytes())
        (tmp_path / "m.pt2.json").write_text(json.dumps({**details, **change}))
        with pytest.raises(RuntimeUnavailable, match=reason):
            load_runtime(copy)
    with pytest.raises(RuntimeUnavailable, match="not for cuda"):
        load_runtime(path, device="cuda")


def test_truncated_file(made, tmp_path):
    _, _, path, details = made
    (tmp_path / "m.pt2").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "m.pt2.json").write_text(json.dumps(details))
    with pytest.raises(fa.InputError, match=r"m\.pt2 cannot be loaded"):
        load_runtime(tmp_path / "m.pt2")


def test_ordinary_operators_where_the_kernels_do_not_compile(made, tmp_path, monkeypatch):
    model, images, _, details = made
    assert (details["triton_kernels"], details["no_triton_kernels"]) == ([], "they are for GPUs")
    monkeypatch.setattr(aotinductor, "_why_not_kernels", lambda layers, device: None)
    layers = [m for m in model.modules() if isinstance(m, FoldedClusterAttention)]
    compiled = []

    def compile_(program, package_path):
        compiled.append([layer.kernels for layer in layers])
        if any(compiled[-1]):
            raise RuntimeError("0 active drivers\nand more")
        zipfile.ZipFile(package_path, "w").close()

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_)
    details = build_aoti(model, (images[:1],), tmp_path / "m.pt2", Batches(1, 4, 8))
    assert compiled == [[True], [False]] and not layers[0].kernels
    assert (details["triton_kernels"], details["gelu_in_products"]) == ([], 0)
    assert details["no_triton_kernels"].endswith("RuntimeError: 0 active drivers")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """One compilation for all that there is to ask."""
    from fastadapt.kernels.cluster_attention.aot import KERNELS

    model, images, path = make_model().cuda(), make_images(64).cuda(), tmp_path / "m.pt2"
    batches = Batches(1, 8, 64)
    details = build_or_skip(build_aoti, model, (images[:1],), path, batches, precision="bf16")
    assert details["targets"] == [target("cuda")]
    assert (details["triton_kernels"], details["no_triton_kernels"]) == (list(KERNELS), None)
    assert details["gelu_in_products"] == 1
    stored = b"".join(map(zipfile.ZipFile(path).read, zipfile.ZipFile(path).namelist()))
    assert all(name.encode() in stored for name in KERNELS)
    with torch.no_grad():
        want = model(images)
    for cuda_graph in (False, True):
        runtime = load_runtime(path, device="cuda", cuda_graph=cuda_graph)
        for batch in (1, 5, 64, 5):  # the last call replays
            got = runtime(images[:batch])
            assert got.device.type == "cuda"
            assert (got - want[:batch]).abs().max() < 0.02 * want.std()
    got = run_elsewhere(path, images, "cuda").cuda()
    assert (got - want[:4]).abs().max() < 0.02 * want.std()


class TestRefused:
    def test_no_compiler(self):
        with (
            torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
            pytest.raises(fa.InputError, match=r"`aoti` needs a C\+\+ compiler.*install g\+\+"),
        ):
            check_compiler()

    def test_what_cannot_be_traced(self, tmp_path):
        class Odd(nn.Module):
            def forward(self, x):
                return x * 2 if x.sum().item() > 0 else x

        with pytest.raises(fa.InputError, match="AOTInductor cannot compile the model: ") as caught:
            build_aoti(Odd(), (torch.rand(1, 3),), tmp_path / "m.pt2")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_library_that_is_linked_statically(self, tmp_path, monkeypatch):
        def compile_(program, package_path):
            with zipfile.ZipFile(package_path, "w") as archive:
                archive.writestr("model/c.wrapper.so", b"libc.so.6")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_)
        with pytest.raises(fa.InputError, match=r"linked its own library statically.*install"):
            build_aoti(nn.Flatten(), (torch.rand(1, 3, 2),), tmp_path / "m.pt2")
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch):
        def full(program, package_path):
            Path(package_path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", full)
        with pytest.raises(OSError, match="No space left"):
            build_aoti(nn.Flatten(), (torch.rand(1, 3, 2),), tmp_path / "m.pt2")
        assert list(tmp_path.iterdir()) == []
