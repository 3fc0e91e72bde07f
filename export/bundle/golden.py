"""``golden.safetensors``: a few images, and what the trained model answers to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastadapt.errors import InputError
from fastadapt.files import write_tensors

from ..graph_input import NAME, GraphInput, Inputs
from .manifest import GOLDEN
from .material import Material

EXPECTED = "expected"


def write_golden(path: Path, material: Material) -> None:
    """Write what the model gets (images in uint8), and the trained model's outputs."""
    names = [sample.path.name for sample in material.chosen]
    labels = [sample.label for sample in material.chosen]
    expected = torch.from_numpy(material.expected)
    tensors = {NAME: material.pixels.given, **material.others, EXPECTED: expected}
    metadata = {"files": names, "labels": labels}
    write_tensors(
        path, tensors, {k: json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}
    )


def golden_inputs(
    tensors: dict[str, Any], names: list[str], preprocessing: dict[str, Any]
) -> Inputs:
    """Make the inputs of a bundle's files from its golden samples.

    Args:
        tensors: what ``golden.safetensors`` holds.
        names: of the inputs, images first.
        preprocessing: as the manifest records it.

    Raises:
        InputError: an input, or the expected output, is not among the tensors.
    """
    for name in (*names, EXPECTED):
        if name not in tensors:
            raise InputError(f"{GOLDEN} lacks the model's input {name!r}: export the run again")
    images, *others = names
    graph_input = GraphInput.from_dict(preprocessing)
    return {
        images: graph_input.array(tensors[images].numpy()),
        **{name: tensors[name].numpy() for name in others},
    }
