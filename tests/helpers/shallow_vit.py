"""timm's smallest ViT with two of its six blocks: its export takes two seconds instead of five.

A model of timm's by name in every process that imports this module.
"""

from timm.models import generate_default_cfgs, register_model, vision_transformer

SHALLOW_VIT = "test_vit_shallow"

_smallest = vision_transformer.default_cfgs["test_vit"].default.to_dict()
default_cfgs = generate_default_cfgs({f"{SHALLOW_VIT}.untrained": _smallest})


@register_model
def test_vit_shallow(pretrained=False, **kwargs):
    sizes = {"patch_size": 16, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 3}
    settings = {**sizes, "depth": 2, "dynamic_img_size": True, **kwargs}
    return vision_transformer._create_vision_transformer(SHALLOW_VIT, pretrained, **settings)
