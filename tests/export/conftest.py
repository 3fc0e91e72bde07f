"""Runs, models and bundles that several tests share."""

import csv
import functools
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_onnx, export_run, export_timm
from fastadapt.export.bundle import material
from fastadapt.export.bundle.build import FoldedModel
from fastadapt.export.bundle.verify_artefact import Reference
from fastadapt.export.graph_input import Deployed, GraphInput
from fastadapt.export.precision.int8 import QuantizationImages
from fastadapt.export.runtimes import load_runtime
from fastadapt.lora import LoRAConfig, lora_layers
from tests.helpers.imagesets import CLASSES, make_folders
from tests.helpers.onnx_registry import keep_onnx_registry
from tests.helpers.shallow_models import SHALLOW_VIT

keep_onnx_registry()

SIZE = (3, 32, 32)
GRAPH_INPUT = GraphInput(Preprocess(SIZE))
DESCRIBED = {
    "opset": 20,
    "inputs": [{"name": "images", "dtype": "uint8", "shape": ["batch", 32, 32, 3]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
}


@pytest.fixture
def no_speed(monkeypatch):
    """Skip seconds per export that prove nothing."""
    monkeypatch.setattr("fastadapt.export.bundle.build.measure", lambda *args: {"1": 1.0})


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Make a run as training leaves it, its images, and the bundle made of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made")
    backbone = timm.create_model(SHALLOW_VIT, num_classes=0, img_size=32)
    torch.save(backbone.state_dict(), folder / "weights.pth")
    config = fa.AdaptConfig(rank=8, num_centers=3, lora=LoRAConfig(r=2), input_size=SIZE)
    model = fa.adapt(SHALLOW_VIT, config, 2, weights=str(folder / "weights.pth"))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["all"], std=0.3)
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg).to_dict()
    fa.save_adapter(model, folder / "run", labels=["crack", "good"], preprocess=preprocess)
    rows = write_images(folder / "images")
    with (folder / "run" / "splits.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    export_run(folder / "run", folder / "bundle")
    return folder


def write_images(folder):
    rng = np.random.default_rng(0)
    rows = []
    for index in range(24):
        label = ("crack", "good")[index % 2]
        path = folder / label / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(path)
        rows.append((str(path), label, "train" if index < 4 else "val"))
    return rows


@pytest.fixture
def run(made, tmp_path):
    """Copy the run."""
    return shutil.copytree(made / "run", tmp_path / "run")


@pytest.fixture
def quick(made, monkeypatch):
    """Copy the ONNX file that was exported before, instead of exporting it anew."""

    def copy(folded, path, **kwargs):
        shutil.copy(made / "bundle" / "model.onnx", path)
        return DESCRIBED

    monkeypatch.setattr(material, "export_onnx", copy)


@pytest.fixture
def broken(made, monkeypatch):
    """Export one weight wrong."""

    def wrong(folded, path, **kwargs):
        model = onnx.load(made / "bundle" / "model.onnx")
        weight = next(t for t in model.graph.initializer if list(t.dims) == [2, 64])
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0, 0] += 0.1
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, path)
        return DESCRIBED

    monkeypatch.setattr(material, "export_onnx", wrong)


@pytest.fixture(scope="session")
def folded_model(tmp_path_factory):
    """Fold a small ViT with an adapter, for files to be built of."""
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

    inputs = {"images": GRAPH_INPUT.array(pixels.numpy())}
    return FoldedModel(
        folder=folder,
        onnx=folder / "model.onnx",
        onnx_parity=(),
        module=folded,
        example=(normalized[:1],),
        reference=Reference(inputs, expected, exact=exact),
        write_onnx=write_onnx,
        deployed=lambda module: Deployed(module, GRAPH_INPUT),
        images=lambda: QuantizationImages([], [], None, lambda files: np.empty(0)),
        speed=False,
    )


@pytest.fixture
def calibrated(folded_model, tmp_path):
    """The small ViT in a folder of its own, with images that calibrate and judge 8-bit files."""
    onnx_file = tmp_path / "model.onnx"
    onnx_file.write_bytes(folded_model.onnx.read_bytes())
    # One colour an image: outputs differ by more than the steps of INT8.
    pixels = np.zeros_like(folded_model.reference.inputs["images"])
    pixels[:] = np.linspace(0, 255, len(pixels) * 3).reshape(len(pixels), 1, 1, 3)
    expected = load_runtime(onnx_file)(pixels)
    images = QuantizationImages(
        range(len(pixels)), range(len(pixels)), None, lambda files: pixels[list(files)]
    )
    return replace(
        folded_model,
        folder=tmp_path,
        onnx=onnx_file,
        images=lambda: images,
        reference=Reference({"images": pixels}, expected),
    )


@pytest.fixture(scope="session")
def tuned_bundles(tmp_path_factory):
    """Make a fine-tuned timm model, images of many kinds, and its bundles with every input."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made")
    model = timm.create_model(SHALLOW_VIT, num_classes=3, img_size=32).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    torch.save(model.state_dict(), folder / "tuned.pth")
    make_folders(folder / "images", per_class=4)
    for name, settings in {
        "uint8": {},
        "float": {"input": "float", "normalize": False},
        "resize": {"resize": True},
    }.items():
        export_timm(
            SHALLOW_VIT,
            folder / name,
            checkpoint=folder / "tuned.pth",
            image_size=32,
            images=folder / "images",
            class_names=CLASSES,
            speed=False,
            **settings,
        )
    write_pictures(folder / "pictures")
    return folder, model


def write_pictures(folder):
    """Write PNGs and a JPEG: gray, transparent, 16-bit, turned, of any size."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    for index, size in enumerate([(40, 30), (33, 90), (200, 150), (32, 32)]):
        patches = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = patches.resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"rgb{index}.png")
        image.convert("L").save(folder / f"gray{index}.png")
        alpha = Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8))
        image.putalpha(alpha)
        image.save(folder / f"alpha{index}.png")
    deep = rng.integers(0, 65536, (40, 50), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    patches.resize((60, 40)).save(folder / "turned.jpg", exif=exif)
