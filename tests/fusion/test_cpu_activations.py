"""Features stay the same with activations inside the convolutions, and nothing else changes."""

import pytest
import timm
import torch
from torch import nn

from fastadapt.adapted_model import adapt
from fastadapt.config import AdaptConfig
from fastadapt.fusion.batch_norm import TOLERANCE, fuse_batch_norms
from fastadapt.fusion.cpu_activations import fuse_activations


def adapted(backbone):
    config = AdaptConfig(adapter="none", input_size=(3, 48, 48))
    return adapt(backbone, config, 2, pretrained=False).eval()


def activations(model, kinds=(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)):
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_features_stay_and_activations_go(name):
    model = adapted(timm.create_model(name, num_classes=0))
    x = torch.randn(2, 3, 48, 48).contiguous(memory_format=torch.channels_last)
    folded = fuse_batch_norms(model, x[:1])
    before = activations(folded)
    fused = fuse_activations(folded, x[:1])
    assert before > 10 and activations(fused) < before / 2 and activations(folded) == before
    with torch.inference_mode():
        want, got = model.backbone_features(x), fused.backbone_features(x)
    assert (got - want).abs().max() <= 2 * TOLERANCE * want.abs().max()


class Shared(nn.Module):
    """The convolution is read by another layer, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        x = self.conv(x)
        return x + self.act(x)


class Twice(nn.Module):
    """The activation is called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.act(self.act(self.conv(x)) - 0.1)


@pytest.mark.parametrize("backbone", [Shared, Twice])
def test_what_would_change_the_features_is_left_alone(backbone):
    model = adapted(backbone())
    assert fuse_activations(model, torch.randn(1, 3, 48, 48)) is model
