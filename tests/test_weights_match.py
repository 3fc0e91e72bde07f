"""The wrong weights are refused, and the model that they belong to is named."""

import pytest
import timm
import torch
from torch import nn

import fastadapt as fa
from fastadapt.weights_match import load_weights, match_weights, suggest_timm_model


def trained(name, **options):
    """A model as after training: timm initialises residual branches to zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and key.endswith(("weight", "gamma")):
                parameter.uniform_(0.3, 1.0)
    return model


def test_a_deeper_model_is_named():
    state = trained("resnet34", num_classes=3).state_dict()
    with pytest.raises(fa.InputError, match=r"holds 80 .*layer1\.2\.conv1\.weight.* resnet34"):
        load_weights(timm.create_model("resnet18"), state, "f.pth", name="resnet18")


def test_a_deeper_model_that_timm_has_not_is_refused(brief_search):
    depths = {"depths": (2, 2, 8, 2)}
    state = trained("convnext_atto", num_classes=0, **depths).state_dict()
    model = timm.create_model("convnext_atto", num_classes=0)
    with pytest.raises(fa.InputError, match=r"stages\.2\.blocks\.6"):
        load_weights(model, state, "f.pth", name="convnext_atto")


def test_a_wider_model_is_named():
    state = trained("vit_small_patch16_224", num_classes=7).state_dict()
    assert suggest_timm_model("vit_tiny_patch16_224", state) == "vit_small_patch16_224"
    assert suggest_timm_model("vit_tiny_patch16_224", state, seconds=0) is None


def test_a_classifier_may_be_left_over_where_that_is_asked_for():
    tuned = trained("resnet18", num_classes=3)
    tuned.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(512, 3))
    model = timm.create_model("resnet18", num_classes=0)
    assert match_weights(model, tuned.state_dict()).classifier == ("fc.1.weight", "fc.1.bias")
    load_weights(model, tuned.state_dict(), "f.pth", name="resnet18", head=False)
    assert torch.equal(model.conv1.weight, tuned.conv1.weight)
    with pytest.raises(fa.InputError, match=r"fc\.1\.weight, fc\.1\.bias look like a classifier"):
        load_weights(model, tuned.state_dict(), "f.pth", name="resnet18")


def test_a_classifier_of_any_name_is_seen():
    model = timm.create_model("resnet18", num_classes=0)
    tuned = {**model.state_dict(), "my_head.0.weight": torch.zeros(5, 512)}
    assert match_weights(model, tuned).classifier == ("my_head.0.weight",)
    extra = {**model.state_dict(), "layer4.2.weight": torch.zeros(5, 512)}
    assert match_weights(model, extra).classifier == ()


def test_constants_of_other_versions_are_no_difference():
    model = timm.create_model("resnet18", num_classes=0)
    state = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    load_weights(model, state, "f.pth", name="resnet18")


@pytest.mark.parametrize("change", ["missing", "shape", "nan"])
def test_what_does_not_fit_is_named(change, brief_search):
    model = timm.create_model("test_vit", num_classes=0)
    state = model.state_dict()
    if change == "missing":
        del state["norm.weight"]
    elif change == "shape":
        state["norm.weight"] = torch.ones(3)
    else:
        state["norm.weight"][0] = float("nan")
    with pytest.raises(fa.InputError, match=r"norm\.weight"):
        load_weights(model, state, "f.pth", name="test_vit")
