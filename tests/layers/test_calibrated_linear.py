import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.checkpoint import set_temperature, temperature_of
from fastadapt.errors import InputError
from fastadapt.export.fold import fold_with_report
from fastadapt.files import read_json, seal, write_json
from fastadapt.layers.calibrated_linear import CalibratedLinear


def test_logits_are_divided_and_parameters_shared():
    linear, x = nn.Linear(5, 3), torch.randn(4, 5)
    head = CalibratedLinear.of(linear, 2.5)
    assert torch.equal(head(x), linear(x) / 2.5)
    assert head.weight is linear.weight and set(head.state_dict()) == {"weight", "bias"}
    assert CalibratedLinear.of(nn.Linear(5, 3, bias=False), 2.0).bias is None


def test_a_temperature_is_saved_loaded_and_folded(tmp_path):
    config = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=0.5, input_size=(3, 32, 32))
    model = fa.adapt("test_vit", config, 3, pretrained=False).eval()
    model.backbone_trained = True  # random weights
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
    assert temperature_of(model) == 1.0
    set_temperature(model, 1.7)
    fa.save_adapter(model, tmp_path / "run")
    loaded = fa.load_adapter(tmp_path / "run")
    folded, report = fold_with_report(loaded)
    assert temperature_of(loaded) == 1.7 and type(folded.head) is nn.Linear
    row = next(row for row in report.layers if row.name == "head")
    assert row.folded.endswith("→3, divided by 1.7") and row.error < 1e-6
    with torch.no_grad():
        for each in (loaded, folded):
            torch.testing.assert_close(each(images), plain / 1.7, rtol=1e-5, atol=1e-6)

    saved = read_json(tmp_path / "run" / "config.json")
    write_json(tmp_path / "run" / "config.json", seal(saved | {"temperature": 0}))
    with pytest.raises(InputError, match="temperature is 0; expected"):
        fa.load_adapter(tmp_path / "run")
    del saved["temperature"]  # as older versions wrote it
    write_json(tmp_path / "run" / "config.json", seal(saved))
    assert temperature_of(fa.load_adapter(tmp_path / "run")) == 1.0
