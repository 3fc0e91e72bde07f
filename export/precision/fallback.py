"""Keep the layers in fp32 that INT8 loses the most accuracy by, until the rest passes the gate.

Half precision's search (:mod:`.half`) tries single layers by the parity check. INT8 is judged by
the accuracy on a few hundred images, which a search among many sets of layers would fit. So
there are few attempts: layers are ranked on images that do not judge, by the error of the outputs
where that layer alone is in INT8, and the first 2, 4, 8, … of them stay in fp32 (a single one gains
little, as two layers share each activation).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..runtimes import Runtime, load_runtime
from ..settings import Calibration
from .int8 import BATCH, Judgement, QuantizationImages, calibrate_int8
from .quantizer import Calibrated, graph_layers

RANKING_IMAGES = 16
FIRST = 2  # layers of the first attempt; each further one has twice as many
MOST = 0.5  # share of the layers: INT8 of fewer is not worth a file


class Int8Layers:
    """The layers of an fp32 ONNX file, and what each of them loses in INT8.

    What is asked for is computed once; nothing is before that.

    Args:
        onnx: the fp32 file.
        images: their ``calibration`` files give ranges of activations, and rank.
        device: as for :func:`.int8.quantize_int8`.
        calibration: of the activations.
    """

    def __init__(
        self,
        onnx: Path,
        images: Callable[[], QuantizationImages],
        device: str = "cpu",
        calibration: Calibration = "max",
    ):
        self._onnx, self._images = onnx, images
        self._device, self._calibration = device, calibration

    @functools.cached_property
    def calibrated(self) -> Calibrated:
        """The graph with its ranges, for ONNX Runtime's INT8."""
        return calibrate_int8(self._onnx, self._images(), self._device, self._calibration)

    @functools.cached_property
    def nodes(self) -> dict[str, list[str]]:
        """Nodes by layer, in the order they run in; without what stays in fp32 in any case."""
        delicate = set(self.calibrated.delicate)
        found = graph_layers(self.calibrated.model.graph)
        return {name: nodes for name, nodes in found.items() if not delicate & set(nodes)}

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Weights by layer as PyTorch lays them out: [outputs, inputs, ...]."""
        import onnx

        graph = self.calibrated.model.graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        given = {node.name: node.input[1] for node in graph.node if len(node.input) > 1}
        found = {}
        for name, nodes in self.nodes.items():
            weight = onnx.numpy_helper.to_array(tensors[given[nodes[0]]])
            found[name] = weight.T if weight.ndim == 2 else weight  # of a product
        return found

    def shifts(self, keep: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return weight and shift of every convolution that does not stay in fp32."""
        graph, shifts = self.calibrated.model.graph, self.calibrated.shifts
        outputs = {node.name: node.output[0] for node in graph.node}
        return [
            (self.weights[name], shifts[outputs[nodes[0]]])
            for name, nodes in self.nodes.items()
            if name not in keep and outputs[nodes[0]] in shifts
        ]

    @functools.cached_property
    def ranked(self) -> list[str]:
        """Layers by what each alone loses in INT8, the most first."""
        images = self._images()
        files = images.calibration[-RANKING_IMAGES:]
        batches = [images.read(files[at : at + BATCH]) for at in range(0, len(files), BATCH)]
        outputs = max(1, len(images.tasks))

        def run(runtime: Runtime) -> list[np.ndarray]:
            found = [runtime.outputs(batch)[:outputs] for batch in batches]
            return [np.concatenate(part) for part in zip(*found, strict=True)]

        expected = run(load_runtime(self._onnx, device="cpu"))
        errors = {}
        with tempfile.TemporaryDirectory(
            dir=self._onnx.parent, prefix=f".{self._onnx.name}."
        ) as folder:
            for name in self.nodes:
                path = Path(folder) / "one.onnx"
                self.calibrated.write(path, [other for other in self.nodes if other != name])
                found = run(load_runtime(path, device="cpu"))
                errors[name] = sum(map(_error, found, expected))
        return sorted(errors, key=lambda name: errors[name], reverse=True)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2).mean() / max(expected.var(), 1e-12))


@dataclass(frozen=True)
class Kept:
    """An 8-bit file that was written last, and its judgement.

    Attributes:
        written: what ``write`` gave.
        judgement: of the file.
        fp32_layers: names of the layers that stay in fp32.
        tried: what was refused before, in words.
    """

    written: Any
    judgement: Judgement
    fp32_layers: tuple[str, ...]
    tried: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest records, as of half precision."""
        return {"fp32_layers": list(self.fp32_layers), "tried": list(self.tried)}


class Layers(Protocol):
    """Layers that can be in 8 bit: something for each by its name, and the names by their loss."""

    @property
    def nodes(self) -> Mapping[str, Any]:
        """Return what there is of each layer, in the order they run in."""

    @property
    def ranked(self) -> Sequence[str]:
        """Return the names by what each alone loses in 8 bit, the most first."""


def keep_layers(
    write: Callable[[Sequence[str]], Any],
    judge: Callable[[], Judgement],
    layers: Layers,
    kept_as: str = "layers in fp32",
) -> Kept:
    """Write an 8-bit file with more layers in fp32 until its accuracy is within the budget.

    Args:
        write: writes the file, with the layers that it is given in fp32.
        judge: judges the file that was written last.
        layers: of the model.
        kept_as: what those that are kept are called.

    Returns:
        The last file, which is not accurate enough if half of the layers are not enough.
    """
    tried: list[str] = []
    count = 0
    while True:
        chosen = set(layers.ranked[:count]) if count else set()
        kept = tuple(name for name in layers.nodes if name in chosen) if chosen else ()
        written, judgement = write(kept), judge()
        count = max(FIRST, 2 * count)
        if judgement.accurate or count > MOST * len(layers.nodes):
            return Kept(written, judgement, kept, tuple(tried))
        tried.append(f"{len(kept)} {kept_as}: {judgement.problems[0]}")
