"""LiteRT, once TensorFlow Lite: a folded model as a .tflite file, for phones and boards.

The file takes one image: LiteRT's converter cannot keep the batch open, and reshapes with the
converted batch stand in the graph. The runtime here computes a batch image by image.

INT8 is made of the fp32 file by Google's AI Edge Quantizer, which LiteRT's converter installs, with
a scale for each output channel of weights and one for each activation.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.errors import InputError, first_line
from fastadapt.files import atomic_path

from ..precision.bias_correction import same_weight
from ..runtime import usable_cores
from ..settings import Batches
from .tracing import plain_attention, plainer, quiet, silent_stderr

SUFFIX = "tflite"
CONVOLUTIONS, PRODUCT, SUM = ("CONV_2D", "DEPTHWISE_CONV_2D"), "FULLY_CONNECTED", "ADD"
SIGNATURE = "serving_default"  # the converter's name of the only one
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


def check_installed(int8: bool) -> None:
    """Raise InputError, with the remedy, if files cannot be written and run here."""
    load_litert()
    for name in ("litert-torch", *(["ai-edge-quantizer"] if int8 else [])):
        if importlib.util.find_spec(name.replace("-", "_")) is None:  # importing takes seconds
            raise InputError(f"{name} is not installed: {REMEDY}")


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
    check_installed(int8=False)
    example = tuple(x[:1].contiguous() for x in example)
    with (
        quiet("jax", "absl"),
        plain_attention(model),
        silent_stderr(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
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
    return _details(batch)


def quantize(
    fp32: str | Path,
    path: str | Path,
    images: Iterable[np.ndarray],
    batch: Batches,
    fp32_weights: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """Write an INT8 version of an fp32 .tflite file; what few numbers decide stays in fp32.

    Args:
        fp32: the file, whose only input is images.
        path: of the result.
        images: batches that give the ranges of the activations, as the file takes them.
        batch: as for :func:`convert`.
        fp32_weights: of layers that stay in fp32, too, as PyTorch lays them out.

    Returns:
        The manifest's details of the file.

    Raises:
        InputError: the quantiser is not installed, or fails; with its reason.
    """
    check_installed(int8=True)
    with quiet("absl"), silent_stderr(), contextlib.redirect_stdout(io.StringIO()):
        try:
            tool = importlib.import_module
            recipe = tool("ai_edge_quantizer.recipe_manager").RecipeManager()
            for operator, output in _quantized_operators(fp32, fp32_weights):
                recipe.add_static_config(f"^{re.escape(output)}$", operator, 8, 8)
            calibrator = tool("ai_edge_quantizer.calibrator").Calibrator(
                str(fp32),
                usable_cores(),
                # Unless told, it takes moving averages, in which the first images count most.
                qsv_update_func=tool("ai_edge_quantizer.utils.qsv_utils").min_max_update,
            )
            for given in images:
                single = [{"args_0": image[None]} for image in given]
                calibrator.calibrate({SIGNATURE: single}, recipe)
            quantizer = tool("ai_edge_quantizer.quantizer").Quantizer(
                str(fp32), recipe.get_quantization_recipe()
            )
            content = quantizer.quantize(
                calibrator.get_model_qsvs(), enable_progress_report=False
            ).quantized_model
        except OSError:
            raise
        except Exception as error:  # its own have no common base
            name, reason = Path(fp32).name, f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"LiteRT's quantiser cannot quantise {name}: {reason}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return _details(batch)


def _quantized_operators(
    path: str | Path, fp32_weights: Sequence[np.ndarray]
) -> Iterator[tuple[str, str]]:
    """Return kind and output of each operator that computes in INT8, as in ONNX Runtime's INT8.

    Those are products of tokens with weights, convolutions, and sums between convolutions; not
    those with one of ``fp32_weights``.
    """
    utilities = importlib.import_module("ai_edge_quantizer.utils.tfl_flatbuffer_utils")
    model = utilities.read_model(str(path))
    for graph in model.subgraphs:
        for node in graph.operators:
            code = model.operatorCodes[node.opcodeIndex].builtinCode
            kind = utilities.TFL_OP_CODE_TO_NAME.get(code)  # an enumeration of strings
            shape = list(graph.tensors[node.inputs[0]].shape or ())
            wanted = (
                kind in CONVOLUTIONS
                or (kind == PRODUCT and np.prod(shape[:-1]) > 1)
                or (kind == SUM and len(shape) == 4)
            )
            if kind in (*CONVOLUTIONS, PRODUCT):
                weight = graph.tensors[node.inputs[1]]
                data = model.buffers[weight.buffer].data
                values = np.frombuffer(b"" if data is None else bytes(data), np.float32)
                laid_out = _as_pytorch(kind, values, list(weight.shape))
                wanted = wanted and not any(same_weight(laid_out, x) for x in fp32_weights)
            if wanted:
                yield kind, utilities.get_op_scope(node, graph.tensors)


def _as_pytorch(kind: str, values: np.ndarray, shape: list[int]) -> np.ndarray:
    """Return an operator's weight as [outputs, inputs, ...]; as it is if it is no constant."""
    if values.size != np.prod(shape):
        return values
    if kind == PRODUCT:
        return values.reshape(shape)
    # [outputs, height, width, inputs], and of depthwise convolutions [1, height, width, outputs].
    axes = (3, 0, 1, 2) if kind == "DEPTHWISE_CONV_2D" else (0, 3, 1, 2)
    return values.reshape(shape).transpose(axes)


def _details(batch: Batches) -> dict[str, Any]:
    return {
        "library": "LiteRT",
        "version": importlib.metadata.version("litert-torch"),
        "batch": batch.to_dict(),
        "images_at_once": 1,
        "targets": ["cpu"],
    }
