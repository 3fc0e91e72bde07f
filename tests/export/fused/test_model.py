"""The file of a fused model: round trip, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastadapt.errors import InputError
from fastadapt.export.backends.fastadapt import build_fused, load_fused
from fastadapt.export.fused.convert import fuse
from fastadapt.export.fused.steps import bias_map
from fastadapt.export.runtimes import load_runtime
from fastadapt.export.settings import Batches
from fastadapt.fusion.kernel_choices import Choices, default_choices
from tests.export.fused.test_convert import deployed, error, images, make_convnext, make_vit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write a file of a small ViT."""
    folder = tmp_path_factory.mktemp("fused")
    model = deployed(make_vit(init_values=0.1))
    build_fused(model, folder / "model.bf16.safetensors", Batches(1, 2, 5))
    return folder / "model.bf16.safetensors", model


def described(path):
    return json.loads(path.with_name(f"{path.name}.json").read_text())


def test_a_file_computes_what_was_saved(made):
    path, model = made
    details = described(path)
    assert details["batch"] == {"min": 1, "opt": 2, "max": 5} and details["format"] == 1
    runtime, x = load_runtime(path, device="cpu"), images()
    assert runtime.name == "fastadapt (plain PyTorch), CPU" and runtime.device == "cpu"
    expected = fuse(model, torch.bfloat16)(x)
    assert torch.equal(runtime(x), expected)
    assert torch.equal(torch.from_numpy(runtime(x.numpy())), expected)
    with pytest.raises(InputError, match=r"fails at batch size 2.*expected uint8"):
        runtime(x[:2, :8])


def test_maps_are_saved_too(tmp_path):
    model = deployed(make_convnext())
    build_fused(model, tmp_path / "m.safetensors", precision="fp16")
    loaded, _ = load_fused(tmp_path / "m.safetensors", described(tmp_path / "m.safetensors"), "cpu")
    x = images()
    assert error(loaded(x), fuse(model, torch.float16)(x).double()) == 0


def changed(path, tmp_path, change):
    """Copy both files after a change to the description and the tensors."""
    details, tensors = described(path), load_file(str(path))
    change(details, tensors)
    save_file(tensors, str(tmp_path / path.name))
    return tmp_path / path.name, details


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.update(format=2), "of format 2; this fastadapt reads 1"),
        (lambda d, t: d["steps"][1].update(kind="exec"), "KeyError: 'exec'"),
        (lambda d, t: d["steps"][1].pop("heads"), "KeyError: 'heads'"),
        (lambda d, t: d["steps"][1].update(heads=1e9), "heads is 1000000000.0"),
        (lambda d, t: d["steps"][1].update(heads=True), "heads is True"),
        (lambda d, t: d["steps"][1].update(more=1), "step 1 has no 'more'"),
        (lambda d, t: d.update(size=[32]), "'size' is"),
        (lambda d, t: d.update(steps=[]), "'steps' is no list"),
        (lambda d, t: d["steps"].reverse(), "."),
        (lambda d, t: t.pop("1.fc1_bias"), "there is no tensor '1.fc1_bias'"),
        (lambda d, t: t.update({"9.x": torch.ones(1)}), "holds '9.x', which no step has"),
    ],
)
def test_damaged_files_are_refused(change, message, made, tmp_path):
    path, details = changed(made[0], tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_fused(path, details, "cpu")


def test_files_that_are_no_safetensors_are_refused(made, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(made[0].read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        load_fused(path, described(made[0]), "cpu")


def test_a_cpu_has_the_librarys_products_and_attention():
    for dtype in (torch.float32, torch.bfloat16):
        assert default_choices(100, dtype, torch.device("cpu")) == Choices("library")


@pytest.mark.parametrize("size", [(5, 9), (1, 2), (7, 7)])
def test_a_bias_map_is_the_convolution_of_a_constant(size):
    weight, bias, shift = torch.randn(49, 6), torch.randn(6), torch.randn(6)
    constant = shift[None, :, None, None].expand(1, 6, *size)
    filters = weight.t().reshape(6, 1, 7, 7)
    expected = torch.nn.functional.conv2d(constant, filters, bias, 1, 3, 1, 6)[0].permute(1, 2, 0)
    torch.testing.assert_close(bias_map(weight, bias, shift, size), expected)
