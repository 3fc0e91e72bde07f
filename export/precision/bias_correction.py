"""Correct the biases of convolutions for what the rounding of their weights to INT8 shifts.

After ReLU, inputs are never negative, so that the errors of rounded weights w [O, I, ...] do not
average out: they move a channel by nearly the same amount for every image. With s the weight's
scale of a channel and x_i the input's channels:

1. e[o] = s[o] · round(w[o] / s[o]) − w[o],   s[o] = max |w[o]| / 127
2. shift[o] = Σ_{i, k} e[o, i, k] · E[x_i],   the mean over images and pixels, borders included
3. b'[o] = b[o] − shift[o]

(M. Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV
2019, section 4.2; the means are those of calibration images.) NNCF does it by itself; the
quantisers of ONNX Runtime, ExecuTorch and LiteRT do not. For the latter two a PyTorch module is
corrected, whose convolutions are found by their weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    import onnx

STEPS = 127  # of INT8 from zero to the largest weight
SUFFIX = "_corrected"


class InputMeans:
    """Means of the inputs of a graph's convolutions, by channel, over batches of images.

    Args:
        model: the fp32 graph; its weights are initializers.
        folder: where a copy of the graph may lie until the object is made.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path):
        import onnx
        import onnxruntime

        observed = onnx.ModelProto()
        observed.CopyFrom(model)
        graph = observed.graph
        del graph.output[:]
        ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        self._sums: dict[str, np.ndarray] = {}
        self._images = 0
        for name, rank in {n.input[0]: ranks[n.input[1]] for n in convolutions(model)}.items():
            axes = onnx.numpy_helper.from_array(np.array([0, *range(2, rank)]), f"{name}_axes")
            graph.initializer.append(axes)
            mean = onnx.helper.make_node("ReduceMean", [name, axes.name], [f"{name}_mean"])
            mean.attribute.append(onnx.helper.make_attribute("keepdims", 0))
            graph.node.append(mean)
            graph.output.append(onnx.helper.make_empty_tensor_value_info(f"{name}_mean"))
            self._sums[name] = np.zeros(1)
        path = folder / "means.onnx"
        onnx.save(observed, path, save_as_external_data=True, location=f"{path.name}.data")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def add(self, batch: np.ndarray) -> None:
        """Run a batch of images."""
        (name,) = (given.name for given in self._session.get_inputs())
        found = self._session.run([f"{tensor}_mean" for tensor in self._sums], {name: batch})
        for tensor, mean in zip(self._sums, found, strict=True):
            self._sums[tensor] = self._sums[tensor] + len(batch) * mean
        self._images += len(batch)

    @property
    def means(self) -> dict[str, np.ndarray]:
        """Means [I] by the name of the tensor."""
        return {name: total / self._images for name, total in self._sums.items()}


def convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the convolutions whose weights are in the graph."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [n for n in model.graph.node if n.op_type == "Conv" and n.input[1] in weights]


def output_shifts(model: onnx.ModelProto, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what rounded weights add to the mean of each convolution's output: equation 2.

    Args:
        model: the fp32 graph.
        means: of the convolutions' inputs, from :class:`InputMeans`.

    Returns:
        [O] by the name of the convolution's output.
    """
    import onnx

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in convolutions(model):
        weight = onnx.numpy_helper.to_array(weights[node.input[1]]).astype(np.float64)
        error = rounding_error(weight).reshape(*weight.shape[:2], -1).sum(axis=2)
        mean = means[node.input[0]]
        groups = len(mean) // weight.shape[1]
        given = np.repeat(mean.reshape(groups, -1), len(weight) // groups, axis=0)  # [O, I/groups]
        found[node.output[0]] = (error * given).sum(axis=1)
    return found


def rounding_error(weight: np.ndarray) -> np.ndarray:
    """Return what symmetric rounding to INT8 with a scale per output channel adds to a weight."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = np.where(largest > 0, largest, 1).reshape(-1, *[1] * (weight.ndim - 1)) / STEPS
    return np.round(weight / scale) * scale - weight


def correct_biases(model: onnx.ModelProto, shifts: Mapping[str, np.ndarray]) -> None:
    """Subtract shifts from the biases of a graph's convolutions, in place.

    Args:
        model: the fp32 graph that is quantised next.
        shifts: [O] by the name of the convolution's output, from :func:`output_shifts`; others
            stay as they are.
    """
    import onnx

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in convolutions(model):
        output = node.output[0]
        if output not in shifts:
            continue
        bias = np.zeros_like(shifts[output])
        if len(node.input) > 2 and node.input[2]:
            bias = onnx.numpy_helper.to_array(tensors[node.input[2]])
        corrected = (bias - shifts[output]).astype(np.float32)
        name = f"{output}{SUFFIX}"
        model.graph.initializer.append(onnx.numpy_helper.from_array(corrected, name))
        node.input[:] = [*node.input[:2], name]
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def corrected_module(
    model: nn.Module, shifts: Iterable[tuple[np.ndarray, np.ndarray]]
) -> nn.Module:
    """Copy a module with shifts subtracted from the biases of its convolutions.

    Args:
        model: in fp32, without batch norms after the convolutions.
        shifts: pairs of a convolution's weight and its shift [O]; those of other weights than the
            module's are left out.
    """
    model, wanted = copy.deepcopy(model), list(shifts)
    for layer in model.modules():
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        weight = layer.weight.detach().numpy()
        shift = next((shift for other, shift in wanted if same_weight(weight, other)), None)
        if shift is not None:
            bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter(bias - torch.from_numpy(shift).float(), requires_grad=False)
    return model


def same_weight(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two weights are the same but for the rounding of what merged batch norms."""
    if one.shape != other.shape:
        return False
    return np.allclose(one, other, rtol=1e-3, atol=1e-5 * float(np.abs(other).max(initial=0)))
