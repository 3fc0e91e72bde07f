"""Fused models in FP8: the linear layers after norms, and those after GELU, in e4m3.

Normalised rows need no calibration: their numbers are bounded by their length, whatever the images
(:func:`~fastadapt.kernels.common.e4m3.norm_factor`). The range of GELU's results is that of the
user's images. Weights have a scale each. Attention and the layer after it stay in bf16: products of
queries, keys and values in e4m3 took 250 µs where cuDNN's attention in bf16 takes 163 (ViT-B/16,
256 images, H100), and rounding cuDNN's result to e4m3 costs more than that layer saves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fastadapt.kernels.common.e4m3 import E4M3, LARGEST, norm_factor, to_e4m3
from fastadapt.kernels.linear_epilogue.checks import MULTIPLE
from fastadapt.kernels.narrow_mlp.checks import WIDEST

from .model import FusedModel
from .steps import ConvNextBlock, Step, TransformerBlock

TINY = 1e-12
SMALLEST = 1e-3  # range of a hidden layer: below, the layer does next to nothing


def convertible(model: FusedModel) -> list[int]:
    """Return the numbers of the steps that can be in FP8.

    ConvNeXt's of few channels stay in bf16, where one kernel computes their MLP.
    """

    def fits(step: Step) -> bool:
        if not isinstance(step, TransformerBlock | ConvNextBlock):
            return False
        sizes = step.fc1_weight.shape
        if isinstance(step, ConvNextBlock) and sizes[1] <= WIDEST:
            return False
        return not any(size % MULTIPLE[E4M3.itemsize] for size in sizes)

    return [index for index, step in enumerate(model.steps) if fits(step)]


def hidden_ranges(model: FusedModel, batches: Iterable[Tensor]) -> dict[int, float]:
    """Return the largest magnitude of GELU's results for each convertible step.

    Args:
        model: in bf16.
        batches: uint8 images [B, H, W, 3] on the model's device.
    """
    wanted = set(convertible(model))
    largest: dict[int, Tensor] = {}

    def observe(index: int, u: Tensor) -> None:
        if index in wanted:
            found = u.abs().amax().float()
            largest[index] = torch.maximum(found, largest.get(index, found))

    for batch in batches:
        model(batch, observe)
    return {index: float(value) for index, value in largest.items()}


def ranked_steps(model: FusedModel, ranges: dict[int, float], images: Tensor) -> list[int]:
    """Return the numbers of steps by what each of them alone loses in FP8, the most first.

    Args:
        model: in bf16.
        ranges: from :func:`hidden_ranges`.
        images: uint8 [B, H, W, 3], which judge nothing else.
    """
    images = images.to(model.device)
    expected = model(images)

    def error(index: int) -> float:
        found = to_float8(model, {index: ranges[index]})(images)
        return float((found - expected).square().mean())

    errors = {index: error(index) for index in ranges}
    return sorted(errors, key=lambda index: errors[index], reverse=True)


def layers_in_float8(model: FusedModel, ranges: dict[int, float]) -> dict[str, float]:
    """Return the names of a model's layers in e4m3, with the largest magnitude of their input.

    Args:
        model: from :func:`to_float8`.
        ranges: what it was made with.
    """
    found = {}
    for index, largest in ranges.items():
        step = model.steps[index]
        for name in ("qkv", "fc1", "fc2"):
            weight = getattr(step, f"{name}_weight", None)
            if weight is not None and weight.dtype == E4M3:
                found[f"{index}.{name}"] = largest if name == "fc2" else weight.shape[1] ** 0.5
    return found


def to_float8(
    model: FusedModel, ranges: dict[int, float], keep: Collection[int] = ()
) -> FusedModel:
    """Return a model with the linear layers of some steps in e4m3.

    Args:
        model: in bf16.
        ranges: from :func:`hidden_ranges`.
        keep: numbers of steps that stay in bf16.
    """
    steps = list(model.steps)
    for index, largest in ranges.items():
        if index not in keep:
            steps[index] = _converted(steps[index], largest)
    return FusedModel(steps, model.size, model.dtype, model.choices)


def _converted(step: Step, largest: float) -> Step:
    assert isinstance(step, TransformerBlock | ConvNextBlock)
    before = norm_factor(step.fc1_weight.shape[1])
    hidden = LARGEST / max(largest, SMALLEST)
    fc1, fc1_scale = _weight(step.fc1_weight)
    fc2, fc2_scale = _weight(step.fc2_weight)
    step = replace(
        step,
        fc1_weight=fc1,
        fc2_weight=fc2,
        fc1_alpha=fc1_scale / before,
        fc2_alpha=fc2_scale / hidden,
        hidden_factor=hidden,
    )
    if isinstance(step, TransformerBlock):
        qkv, scale = _weight(step.qkv_weight)
        step = replace(step, qkv_weight=qkv, qkv_alpha=scale / before)
    return step


def _weight(weight: Tensor) -> tuple[Tensor, float]:
    """Return a weight in e4m3, and what it is multiplied by."""
    scale = max(float(weight.abs().amax()), TINY) / LARGEST
    return to_e4m3(weight, 1 / scale), scale
