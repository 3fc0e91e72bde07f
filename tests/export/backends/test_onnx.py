import json
from functools import partial

import numpy as np
import onnx
import pytest
import timm
import torch
from timm.models import mobilenetv3
from torch import nn

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_onnx
from fastadapt.export.backends import onnx as onnx_step
from fastadapt.export.bundle.gate import onnx_session
from fastadapt.export.graph_input import GraphInput
from fastadapt.lora import LoRAConfig, lora_layers


def clip_tower():
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.CLIPVisionCfg(
        layers=2, width=64, head_width=32, patch_size=16, image_size=64
    )
    return open_clip.model._build_vision_tower(32, config)


def video():
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 16, 3)
    )


def mobilenet():
    """MobileNetV3 with a block of each kind: ReLU, hard swish, squeeze and excitation."""
    blocks = ["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r1_k5_s2_e4_c24_se0.25"], ["cn_r1_k1_s1_c48"]
    excite = {"gate_layer": "hard_sigmoid", "force_act_layer": nn.ReLU}
    return mobilenetv3.MobileNetV3(
        mobilenetv3.decode_arch_def(blocks),
        num_features=64,
        act_layer=nn.Hardswish,
        se_layer=partial(mobilenetv3.SqueezeExcite, **excite),
    )


def timm_model(name, **kwargs):
    return lambda: timm.create_model(name, **kwargs)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
ONE_BLOCK = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}
TINY_14 = {**ONE_BLOCK, "img_size": 28}
SWIN = {"img_size": 56, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}
BACKBONES = {
    "vit": (timm_model("vit_tiny_patch16_224", **VIT), (3, 32, 32)),
    "beit": (timm_model("beit_base_patch16_224", **{**VIT, "patch_size": 16}), (3, 32, 32)),
    "swin": (timm_model("swin_tiny_patch4_window7_224", **SWIN), (3, 56, 56)),
    "convnext": (timm_model("test_convnext", depths=(1, 1, 1, 1)), (3, 64, 64)),
    "efficientnet": (timm_model("test_efficientnet"), (3, 64, 64)),
    "resnet": (timm_model("test_resnet"), (3, 64, 64)),
    "mobilenet": (mobilenet, (3, 64, 64)),
    "layer scale": (timm_model("deit3_small_patch16_224", **ONE_BLOCK), (3, 32, 32)),
    "two class tokens": (timm_model("deit_tiny_distilled_patch16_224", **ONE_BLOCK), (3, 32, 32)),
    "registers": (timm_model("vit_small_patch14_reg4_dinov2", **TINY_14), (3, 28, 28)),
    "rotary": (timm_model("eva02_tiny_patch14_224", **TINY_14), (3, 28, 28)),
    "clip": (clip_tower, (3, 64, 64)),
    "video": (video, (3, 6, 16, 16)),
}
FLOAT = ("vit", "resnet")  # the other input


def check_parity(model, session, sizes, to_input, to_array=None, batches=(1, 2, 3, 5)):
    """The unfolded model and the file agree at every batch size; the outputs do vary."""
    name = session.get_inputs()[0].name
    for batch in batches:
        x = torch.randint(0, 256, (batch, *sizes), dtype=torch.uint8)
        with torch.no_grad():
            want = model.eval()(to_input(x.float())).numpy()
        array = x.float().numpy() if to_array is None else to_array(x.numpy())
        got = session.run(None, {name: array})[0]
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
        assert batch == 1 or want.std(axis=0).max() > 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(tmp_path, name):
    make, size = BACKBONES[name]
    lora = LoRAConfig(r=2, targets="all-linear") if name in ("vit", "swin") else None
    config = fa.AdaptConfig(rank=8, num_centers=3, input_size=size, lora=lora)
    model = fa.adapt(make(), config, num_classes=4)
    for layer in lora_layers(model).values():
        for b in layer.lora_B.values():
            nn.init.normal_(b, std=0.1)
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    graph_input = GraphInput(Preprocess((3, 32, 32)), "float" if name in FLOAT else "uint8")
    described = export_onnx(
        fa.fold(model),
        tmp_path / "m.onnx",
        input_size=size,
        graph_input=graph_input,
        labels=list("abcd"),
    )
    shape = size if name in FLOAT else (*size[1:], 3)
    dtype = "float32" if name in FLOAT else "uint8"
    assert described["inputs"] == [{"name": "images", "dtype": dtype, "shape": ["batch", *shape]}]
    assert described["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 4]}]
    assert fused == [getattr(module, "fused_attn", None) for module in model.modules()]
    mean, std = (
        torch.tensor(values).view(-1, *(1,) * (len(size) - 1))
        for values in (graph_input.preprocess.mean, graph_input.preprocess.std)
    )
    session = onnx_session(tmp_path / "m.onnx")
    check_parity(model, session, size, lambda x: (x / 255 - mean) / std, graph_input.array)


def test_generic_module_without_normalization(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), fa.QuaternionLinear(32, 16)
    )
    folded = fa.fold(model)
    described = export_onnx(folded, tmp_path / "m.onnx", input_size=(3, 12, 12))
    assert described["outputs"][0]["name"] == "features"
    check_parity(model, onnx_session(tmp_path / "m.onnx"), (3, 12, 12), lambda x: x)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    model = fa.fold(fa.adapt(nn.Conv2d(3, 8, 4), fa.AdaptConfig(rank=4, input_size=(3, 8, 8))))
    metadata = {"backbone": "conv", "preprocessing": {"mean": [0.5]}}
    export_onnx(
        model, folder / "m.onnx", input_size=(3, 8, 8), labels=["ä", "b"], metadata=metadata
    )
    return folder / "m.onnx"


class TestFile:
    def test_is_one_file_and_passes_the_checker(self, file):
        assert [path.name for path in file.parent.iterdir()] == ["m.onnx"]
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file)
        assert {opset.domain: opset.version for opset in model.opset_import} == {"": 20}
        assert not model.functions

    def test_carries_labels_and_metadata(self, file):
        found = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        assert json.loads(found["labels"]) == ["ä", "b"]
        assert found["backbone"] == "conv"
        assert json.loads(found["preprocessing"]) == {"mean": [0.5]}

    def test_tells_nothing_of_the_machine(self, file):
        content = file.read_bytes()
        for trace in (b"site-packages", b'File "', b"stack_trace", b"fastadapt/"):
            assert trace not in content


def test_weights_beyond_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_step, "ONE_FILE_LIMIT", 100)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 300))
    export_onnx(model, tmp_path / "m.onnx", input_size=(3, 8, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    check_parity(model, onnx_session(tmp_path / "m.onnx"), (3, 8, 8), lambda x: x)


class TestRefused:
    def test_python_that_cannot_be_traced(self, tmp_path):
        class Odd(nn.Module):
            def forward(self, x):
                return x.flatten(1) if x.sum().item() > 0 else x.flatten(1) * 2

        with pytest.raises(fa.InputError, match=r"Odd cannot be exported to ONNX: .+") as caught:
            export_onnx(Odd(), tmp_path / "m.onnx", input_size=(3, 4, 4))
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_batch_that_became_fixed(self, tmp_path):
        class Fixed(nn.Module):
            def forward(self, x):
                return x.flatten(1) * len(list(x))

        with pytest.raises(fa.InputError, match=r"batch|Fixed"):
            export_onnx(Fixed(), tmp_path / "m.onnx", input_size=(3, 4, 4))

    def test_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(onnx.checker, "check_model", full)
        with pytest.raises(OSError, match="No space left"):
            export_onnx(nn.Flatten(), tmp_path / "m.onnx", input_size=(3, 4, 4))
        assert list(tmp_path.iterdir()) == []


def test_the_exporter_is_quiet(tmp_path, capfd):
    export_onnx(nn.Flatten(), tmp_path / "m.onnx", input_size=(3, 4, 4))
    assert capfd.readouterr() == ("", "")
