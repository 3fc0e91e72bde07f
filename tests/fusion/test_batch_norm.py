import pytest
import timm
import torch
from torch import nn

from fastadapt.adapted_model import adapt
from fastadapt.config import AdaptConfig
from fastadapt.fusion.batch_norm import TOLERANCE, fuse_batch_norms


def adapted(backbone):
    model = adapt(backbone, AdaptConfig(adapter="none", input_size=(3, 64, 64)), 2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050"])
def test_features_stay_and_norms_go(name):
    model = adapted(timm.create_model(name, num_classes=0))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    fused = fuse_batch_norms(model, x[:1])
    assert norms(model) > 10 and norms(fused) == 0
    with torch.inference_mode():
        want, got = model.backbone_features(x), fused.backbone_features(x)
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_in_fp64_nothing_is_left_of_the_difference():
    model = adapted(timm.create_model("resnet18", num_classes=0)).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    fused = fuse_batch_norms(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(fused.backbone_features(x), model.backbone_features(x))


class Shared(nn.Module):
    """The first batch norm's convolution is read by another layer, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


def test_what_would_change_the_features_is_left_alone():
    model = adapted(Shared())
    assert fuse_batch_norms(model, torch.randn(1, 3, 64, 64)) is model
    vit = adapt(timm.create_model("test_vit", num_classes=0), AdaptConfig(adapter="none"), 2)
    assert fuse_batch_norms(vit, torch.randn(1, *vit.spec.input_size)) is vit
