"""Make backbones by name or take modules as they are, and find out what features they return."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.checkpoint_reader import read_state_dict
from fastadapt.config import Layout
from fastadapt.errors import InputError, first_line, nearest
from fastadapt.pyramid import PYRAMIDS, pyramid_features, pyramid_levels
from fastadapt.weights_match import load_weights, pooling_options

FeatureFn = Callable[[nn.Module, Tensor], Tensor]
MOST_VALUES = 2**27  # of one image or volume: [1, 512, 512, 512], say
LARGEST_IMAGE = 8192  # in pixels, of models whose position embedding is made for a size
# How timm names models that stand in a folder or on a hub, with their own configuration.
SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
CLASS_TOKEN = re.compile(
    r"(^|\.)(cls|class|dist|reg|register)_?(tokens?|embedding|emb|pos_emb)(_?\d+)?$"
)
CROP_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}  # open_clip's, timm's
LAYOUTS = ("tokens", "channels_first", "channels_last")


class UnknownModel(InputError):
    """A name that is none of timm's."""


@dataclass(frozen=True)
class FeatureSpec:
    """Describe the output of a backbone's feature function.

    Attributes:
        dim: channels C.
        layout: ``tokens`` [B, N, C], ``channels_first`` [B, C, (D,) H, W] or ``channels_last``.
        num_prefix_tokens: class and register tokens before the patches.
        num_tokens: patches at ``input_size``, prefix tokens not counted.
        input_size: [C, H, W] or [C, D, H, W] of the probe.
    """

    dim: int
    layout: Layout
    num_prefix_tokens: int
    num_tokens: int
    input_size: tuple[int, ...]


@dataclass(frozen=True)
class Tower:
    """Hold the module that computes image features, and its input's configuration.

    Attributes:
        module: a timm model, an open_clip tower or any module.
        input_config: as timm's ``pretrained_cfg``: ``input_size``, ``mean``, ``std``, …
    """

    module: nn.Module
    input_config: dict[str, Any]


@dataclass(frozen=True)
class Backbone:
    """Hold a backbone and all that was found out about it.

    Attributes:
        module: as in :class:`Tower`.
        input_config: as in :class:`Tower`.
        feature_fn: returns features of (module, images).
        spec: of those features.
        source: how the module was made, for checkpoints.
    """

    module: nn.Module
    input_config: dict[str, Any]
    feature_fn: FeatureFn
    spec: FeatureSpec
    source: dict[str, Any]


def create_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = 0,
    state: dict[str, Tensor] | None = None,
    weights_name: str = "weights",
    drop_path: float = 0.0,
) -> nn.Module:
    """Make a timm model, without its classifier unless ``num_classes`` says otherwise.

    Args:
        name: timm's name, with or without a tag (``vit_base_patch16_224.augreg_in21k``).
        pretrained: fetch timm's weights; ignored if ``weights`` is given.
        weights: a local file of weights (.safetensors, .pth); classifier weights in it are unused.
        image_size: for models that are built for one size (ViT, Swin).
        num_classes: of the classifier; timm's own if ``None``.
        state: a state dict that is going to be loaded, for what the way of pooling decides.
        weights_name: what error messages call ``weights``.
        drop_path: timm's ``drop_path_rate``: the probability that the last block is dropped in
            training.

    Raises:
        InputError: the name is unknown, weights are unavailable or do not fit, or the model cannot
            drop blocks.
    """
    import timm

    if image_size is not None and not 1 <= image_size <= LARGEST_IMAGE:
        raise InputError(f"input_size is {image_size}; expected 1 to {LARGEST_IMAGE} pixels")
    architecture = name.partition(".")[0]
    if not name.startswith(SCHEMES) and not timm.is_model(architecture):
        known = [*timm.list_models(), *timm.list_models(pretrained=True)]
        raise UnknownModel(f"timm has no model {name!r}. Nearest: {nearest(name, known)}")
    kwargs: dict[str, Any] = {"pretrained": pretrained and weights is None}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if weights is not None:
        state = read_state_dict(weights)
    if state is not None:
        kwargs |= pooling_options(state)
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    try:
        if image_size is not None:
            try:
                model = timm.create_model(name, img_size=image_size, **kwargs)
            except TypeError:  # convolutional models take any size, and no such argument
                model = timm.create_model(name, **kwargs)
        else:
            model = timm.create_model(name, **kwargs)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if "pretrained" not in str(error).lower():
            raise InputError(f"timm cannot make {name!r}: {first_line(error)}") from error
        known = timm.list_models(pretrained=True)
        raise InputError(
            f"no pretrained weights for {name!r} ({error}). Nearest with weights: "
            f"{nearest(name, known)}. Or give a local file with `{weights_name}=...`."
        ) from None
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise InputError(
            f"drop_path is {drop_path}, but {name} cannot drop blocks: leave `drop_path` out"
        ) from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the weights of {name!r} could not be downloaded ({reason}). "
            f"Give a local file with `{weights_name}=...`."
        ) from None
    if weights is not None and state is not None:
        load_weights(model, state, weights, name=name, head=False)
    return model


def image_tower(model: nn.Module) -> Tower:
    """Return the part of a model that computes image features, a timm model inside a tower, say."""
    visual: Any = model
    if hasattr(visual, "visual") and hasattr(visual, "encode_image"):
        visual = visual.visual  # a whole CLIP model
    config = pretrained_cfg(visual)
    trunk = getattr(visual, "trunk", None)
    if trunk is None or not hasattr(trunk, "forward_features"):
        return Tower(visual, config)
    # CLIP's normalisation belongs to the tower, not to the trunk's timm configuration.
    return Tower(trunk, {**pretrained_cfg(trunk), **(config if config.get("mean") else {})})


def embed_clip_patches(visual: Any, images: Tensor) -> Tensor:
    """Embed images [B, 3, H, W] as the first layer's input [B, 1 + N, D] of an open_clip ViT."""
    return visual._embeds(images)  # open_clip has no public function for this


def _clip_vit_features(visual: Any, x: Tensor) -> Tensor:
    x = visual.transformer(embed_clip_patches(visual, x))
    pooled_first = visual.final_ln_after_pool or visual.attn_pool is not None
    return x if pooled_first else visual.ln_post(x)


def _clip_resnet_features(visual: Any, x: Tensor) -> Tensor:
    x = visual.stem(x)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = stage(x)
    return x


def forward_features(backbone: Any, x: Tensor) -> Tensor:
    """Call ``backbone.forward_features``; the feature function of timm models."""
    return backbone.forward_features(x)


def _forward(backbone: nn.Module, x: Tensor) -> Tensor:
    return backbone(x)


def feature_function(backbone: nn.Module, features: str | FeatureFn | None) -> FeatureFn:
    """Return the function that computes this backbone's features of images.

    ``features`` may be a function of (backbone, images), the name of a method, ``"pyramid"`` or
    ``"pyramid-deviations"`` (:mod:`fastadapt.pyramid`), ``"auto"``, the pyramid of backbones that
    have one, or ``"last"`` or ``None``: then it is ``forward_features`` (timm, and any module that
    has it), the tokens of an open_clip tower, or the module's own forward.
    """
    if callable(features):
        return features
    if features == "last":
        features = None
    if features in PYRAMIDS or features == "auto":
        if pyramid_levels(backbone):
            return PYRAMIDS.get(features, pyramid_features)
        if features != "auto":
            raise InputError(
                f"features is {features!r}, but {type(backbone).__name__} has no maps of several "
                "resolutions that timm knows: leave `features` out"
            )
        features = None
    if isinstance(features, str):
        if not callable(getattr(backbone, features, None)):
            raise InputError(
                f"features is {features!r}, but {type(backbone).__name__} has no such method: give "
                "the name of one, or in Python a function of (backbone, images)"
            )
        return lambda module, x: getattr(module, features)(x)
    if hasattr(backbone, "forward_features"):
        return forward_features
    if all(hasattr(backbone, part) for part in ("_embeds", "transformer", "ln_post")):
        return _clip_vit_features
    if all(hasattr(backbone, part) for part in ("stem", "layer4", "attnpool")):
        return _clip_resnet_features
    return _forward


def pretrained_cfg(backbone: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a backbone's input, or the same for an open_clip tower."""
    config: Any = getattr(backbone, "pretrained_cfg", None)
    if config is not None:
        config = config if isinstance(config, dict) else config.to_dict()
        return dict(config)
    size: Any = getattr(backbone, "image_size", None)
    if size is None:
        return {}
    height, width = (size, size) if isinstance(size, int) else size
    result: dict[str, Any] = {
        "input_size": (3, height, width),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    tower: Any = backbone
    if getattr(tower, "image_mean", None) is not None:
        result |= {"mean": tuple(tower.image_mean), "std": tuple(tower.image_std)}
    # What the weights were trained with, SigLIP's and CLIPA's squashed images for one.
    given = getattr(tower, "preprocess_cfg", None) or {}
    result |= {key: tuple(given[key]) for key in ("mean", "std") if given.get(key)}
    if given.get("interpolation"):
        result["interpolation"] = given["interpolation"]
    if given.get("resize_mode"):
        mode = given["resize_mode"]
        result["crop_mode"] = CROP_MODES.get(mode, mode)
    return result


def default_input_size(tower: Tower) -> tuple[int, ...] | None:
    """Return the input size [C, H, W] that a backbone was built for, if it is known."""
    size = tower.input_config.get("input_size")
    built_for: Any = getattr(getattr(tower.module, "patch_embed", None), "img_size", None)
    if built_for is not None and size is not None:
        return (size[0], *built_for)
    return None if size is None else tuple(size)


def probe(
    tower: Tower,
    feature_fn: FeatureFn,
    *,
    input_size: tuple[int, ...] | None = None,
    layout: Layout | None = None,
    num_prefix_tokens: int | None = None,
    settings: str = "AdaptConfig",
) -> FeatureSpec:
    """Run the backbone once, on one image of zeros, and describe its features.

    Args:
        tower: the backbone.
        feature_fn: computes its features.
        input_size: [C, H, W] or [C, D, H, W]; the backbone's own if ``None``.
        layout: of the features; found from their shape if ``None``.
        num_prefix_tokens: of the features; the backbone's own if ``None``.
        settings: the class through which a user gives these arguments, for error messages.

    Raises:
        InputError: no input size is known, the features are no tokens, map or volume, or their
            layout cannot be told from their shape.
    """
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    if layout is None and feature_fn in PYRAMIDS.values():
        layout = "channels_first"  # whatever the backbone's own is
    backbone = tower.module
    input_size = input_size or default_input_size(tower)
    name = type(backbone).__name__
    if input_size is None:
        raise InputError(
            f"{name} does not say which input it takes: give {settings}(input_size=(3, 224, 224)) "
            "or, for volumes, (C, D, H, W)"
        )
    if math.prod(input_size) > MOST_VALUES:
        raise InputError(
            f"input_size is {input_size}, {math.prod(input_size):,} values an image; expected at "
            f"most {MOST_VALUES:,}"
        )
    parameter = next((p for p in backbone.parameters() if p.is_floating_point()), None)
    like: dict[str, Any] = (
        {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    )
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            features = feature_fn(backbone, torch.zeros(1, *input_size, **like))
    except Exception as error:
        raise InputError(
            f"{name} does not take an input of [1, {', '.join(map(str, input_size))}]: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    finally:
        backbone.train(was_training)
    if not isinstance(features, Tensor) or features.dim() not in (3, 4, 5):
        got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features)
        raise InputError(
            f"the features of {name} have {got}; expected tokens [B, N, C], a map [B, C, H, W] or "
            f"a volume [B, C, D, H, W]. Give {settings}(features=...): a method's name, or a "
            "function of (backbone, images) that stops before pooling."
        )
    shape = tuple(features.shape)
    if layout is None:
        layout = _layout(backbone, shape, settings)
    elif (layout == "tokens") != (len(shape) == 3):
        raise InputError(f"layout={layout!r} does not fit features of shape {shape}")
    if layout == "tokens":
        prefix: Any = num_prefix_tokens
        if prefix is None:
            prefix = stated_prefix_tokens(backbone, feature_fn)
        if prefix is None:
            prefix = _find_prefix_tokens(backbone, shape[1], input_size, settings)
        if not 0 <= prefix < shape[1]:
            raise InputError(f"num_prefix_tokens is {prefix}; the features have {shape[1]} tokens")
        return FeatureSpec(shape[2], layout, prefix, shape[1] - prefix, input_size)
    dim, *spatial = (
        (shape[1], *shape[2:]) if layout == "channels_first" else (shape[-1], *shape[1:-1])
    )
    return FeatureSpec(dim, layout, 0, math.prod(spatial), input_size)


def stated_prefix_tokens(backbone: nn.Module, feature_fn: FeatureFn) -> int | None:
    """Return how many class and register tokens the features begin with, if the backbone says."""
    if feature_fn is _clip_vit_features:
        return 1
    return getattr(backbone, "num_prefix_tokens", None)  # type: ignore[return-value]


def _find_prefix_tokens(
    backbone: nn.Module, tokens: int, input_size: tuple[int, ...], settings: str
) -> int:
    """Find how many tokens are no patches in a backbone that has class tokens and does not say.

    The patches form a grid of the image's aspect ratio: VOLO's 197 tokens are 1 + 14 · 14.

    Raises:
        InputError: the features are class tokens alone (PiT), or no number or several fit.
    """
    own = [p for name, p in backbone.named_parameters() if CLASS_TOKEN.search(name)]
    if not own:
        return 0
    name = type(backbone).__name__
    rows = sum(p.shape[-2] if p.dim() > 1 else 1 for p in own)
    if tokens <= rows:
        raise InputError(
            f"the features of {name} are its {tokens} class tokens alone, without patches to "
            f"adapt: give {settings}(features=...), a function that returns the tokens before"
        )
    fits = [count for count in range(rows + 1) if _is_grid(tokens - count, input_size[1:])]
    fits = [count for count in fits if count == rows] or fits
    if len(fits) != 1:
        raise InputError(
            f"{name} has class tokens and does not say how many of its {tokens} tokens are no "
            f"patches: give {settings}(num_prefix_tokens=...)"
        )
    return fits[0]


def _is_grid(tokens: int, size: tuple[int, ...]) -> bool:
    """Tell whether some tokens form a grid with the aspect ratio of the image."""
    if tokens < 1:
        return False
    patch = (math.prod(size) / tokens) ** (1 / len(size))  # its side in pixels
    return all(abs(length / patch - round(length / patch)) < 1e-6 for length in size)


def _layout(backbone: nn.Module, shape: tuple[int, ...], settings: str) -> Layout:
    if len(shape) == 3:
        return "tokens"
    stated = str(getattr(backbone, "output_fmt", "")).upper()
    if stated in ("NHWC", "NCHW"):
        return "channels_last" if stated == "NHWC" else "channels_first"
    # The number of channels rarely equals the width: the two equal sizes are height and width.
    first, last = shape[-2] == shape[-1], shape[-3] == shape[-2]
    if first == last:
        width = getattr(backbone, "num_features", None)
        first, last = shape[1] == width, shape[-1] == width
    if first == last:
        raise InputError(
            f"the features of {type(backbone).__name__} have shape {shape}: which dimension holds "
            f"the channels? Give {settings}(layout='channels_first') or 'channels_last'."
        )
    return "channels_first" if first else "channels_last"
