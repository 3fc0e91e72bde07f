"""LiteRT, once TensorFlow Lite: a folded model as a .tflite file, for phones and boards.

The file takes one image: LiteRT's converter cannot keep the batch open, and reshapes with the
converted batch stand in the graph. The runtime here computes a batch image by image.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError, first_line
from fastadapt.files import atomic_path

from ..settings import Batches
from .tracing import plain_attention, plainer, quiet

SUFFIX = "tflite"
REMEDY = "pip install 'fastadapt[litert]', in an environment of its own perhaps"


def load_litert() -> Any:
    """Import LiteRT's runtime, which is small and needs no converter.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("ai_edge_litert.interpreter")
    except ImportError as error:
        raise InputError(f"ai-edge-litert is not installed: {REMEDY}") from error


def check_installed() -> None:
    """Raise InputError, with the remedy, if files cannot be written and run here."""
    load_litert()
    if importlib.util.find_spec("litert_torch") is None:  # importing it takes seconds
        raise InputError(f"litert-torch is not installed: {REMEDY}")


@torch.no_grad()
def convert(
    model: nn.Module, example: tuple[Tensor, ...], path: str | Path, batch: Batches
) -> dict[str, Any]:
    """Write a model, on the CPU and in fp32, as a .tflite file for single images.

    Args:
        model: ordinary operators only; maps inputs like ``example`` to one tensor or several.
        example: inputs with any batch.
        path: ends in ``.tflite``.
        batch: the sizes that the runtime, which computes image by image, is compared at.

    Returns:
        The manifest's details of the file.

    Raises:
        InputError: LiteRT's converter is not installed, or does not take the model; with its
            reason.
    """
    check_installed()
    example = tuple(x[:1].contiguous() for x in example)
    with quiet("jax", "absl"), plain_attention(model), contextlib.redirect_stdout(io.StringIO()):
        try:
            converter = importlib.import_module("litert_torch")
            program = torch.export.export(model.eval(), example)
            converted = converter.convert(plainer(program), example)
            with atomic_path(path) as temporary:
                # It insists on the suffix, and a temporary name has another.
                named = temporary.with_name(f"{temporary.name}.{SUFFIX}")
                try:
                    converted.export(str(named))
                    named.replace(temporary)
                finally:
                    named.unlink(missing_ok=True)
        except OSError:
            raise
        except Exception as error:  # the converter's own, JAX's and MLIR's have no common base
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"LiteRT cannot convert the model: {reason}") from error
    return {
        "library": "LiteRT",
        "version": importlib.metadata.version("litert-torch"),
        "batch": batch.to_dict(),
        "images_at_once": 1,
        "targets": ["cpu"],
    }
