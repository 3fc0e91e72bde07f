"""timm's smallest models with fewer blocks: an export takes two seconds instead of five.

They are models of timm's by name in every process that imports this module.
"""

from timm.models import convnext, generate_default_cfgs, register_model, vision_transformer

SHALLOW_VIT, SHALLOW_CONVNEXT = "test_vit_shallow", "test_convnext_shallow"

_vit = vision_transformer.default_cfgs["test_vit"].default.to_dict()
_convnext = convnext.default_cfgs["test_convnext"].default.to_dict()
default_cfgs = generate_default_cfgs(
    {f"{SHALLOW_VIT}.untrained": _vit, f"{SHALLOW_CONVNEXT}.untrained": _convnext}
)


@register_model
def test_vit_shallow(pretrained=False, **kwargs):
    sizes = {"patch_size": 16, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 3}
    settings = {**sizes, "depth": 2, "dynamic_img_size": True, **kwargs}
    return vision_transformer._create_vision_transformer(SHALLOW_VIT, pretrained, **settings)


@register_model
def test_convnext_shallow(pretrained=False, **kwargs):
    sizes = {"depths": (1, 1, 1, 1), "dims": (24, 32, 48, 64), "act_layer": "gelu_tanh"}
    settings = {**sizes, "norm_eps": 1e-5, **kwargs}
    return convnext._create_convnext(SHALLOW_CONVNEXT, pretrained, **settings)
