"""The input of a bundle's files: how much of the preprocessing is inside the graph.

What a graph leaves to its users, they get wrong sooner or later. Normalisation can always be
inside: the input is then the image's own bytes, uint8 [batch, H, W, 3], or RGB in [0, 1]. Resizing
can be for ONNX Runtime: Pillow's antialiased filters exist as ONNX's Resize since opset 18.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.info import versions

Inputs = dict[str, np.ndarray]  # what a file takes, by name: [samples, ...], images first

NAME, BATCH = "images", "batch"
DTYPES = ("uint8", "float")
# ONNX's names of Pillow's filters; Pillow's cubic has a = -0.5, ONNX's default is -0.75.
RESIZE_MODES = {"bilinear": 'mode = "linear"', "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5'}


def check_settings(dtype: str, normalize: bool, resize: bool) -> None:
    """Raise InputError where settings of a :class:`GraphInput` exclude each other."""
    if dtype not in DTYPES:
        raise InputError(f"input is {dtype!r}; expected {' or '.join(DTYPES)}")
    if dtype == "uint8" and not normalize:
        raise InputError("a uint8 input is always normalised in the graph: give `input='float'`")
    if dtype == "float" and resize:
        raise InputError("`resize` is for images as they are decoded: give `input='uint8'`")


@dataclass(frozen=True)
class GraphInput:
    """The input of an exported graph.

    Attributes:
        preprocess: the preprocessing that the model was trained with.
        dtype: ``"uint8"``: uint8 [batch, H, W, 3] as decoded (volumes: [batch, D, H, W, 3]);
            ``"float"``: fp32 [batch, 3, H, W] in [0, 1].
        normalize: the normalisation is in the graph. Always so with uint8.
        resize: resizing and cropping are in the graph, too: images of any size, one size per
            batch. uint8 only.

    Raises:
        InputError: settings that exclude each other, or a way of resizing that ONNX lacks.
    """

    preprocess: Preprocess
    dtype: str = "uint8"
    normalize: bool = True
    resize: bool = False

    def __post_init__(self) -> None:
        check_settings(self.dtype, self.normalize, self.resize)
        if self.resize:
            self._check_resize()

    def _check_resize(self) -> None:
        p = self.preprocess
        if p.interpolation not in RESIZE_MODES:
            raise InputError(
                f"`resize`: ONNX has no {p.interpolation} filter like Pillow's, only "
                f"{' and '.join(RESIZE_MODES)}: resize outside the graph"
            )
        _, height, width = p.input_size
        if p.crop_mode == "border" or (p.crop_mode == "center" and height != width):
            raise InputError(
                f"`resize`: crop_mode {p.crop_mode!r} at {height}×{width} is not in the graph: "
                "resize outside it"
            )

    def array(self, images: np.ndarray) -> np.ndarray:
        """Convert images to what the graph takes.

        Args:
            images: uint8 [B, 3, H, W], as :meth:`Preprocess.read` gives them; with ``resize``
                decoded images of any one size.
        """
        if self.dtype == "uint8":
            return np.ascontiguousarray(np.moveaxis(images, 1, -1))
        values = images.astype(np.float32) / np.float32(255)
        if self.normalize:
            return values
        shape = (-1, *(1,) * (images.ndim - 2))
        mean = np.asarray(self.preprocess.mean, np.float32).reshape(shape)
        return (values - mean) / np.asarray(self.preprocess.std, np.float32).reshape(shape)

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's entry: the settings, and each step from file to model in words."""
        p = self.preprocess
        composed: Any = p.transform
        timm_steps = composed.transforms
        scaling = "16 bit / 257"
        if p.intensity_range is not None:
            scaling = "values from {:g} to {:g} to 0–255".format(*p.intensity_range)
        steps = [
            (
                f"decode to 8-bit RGB: orientation tag applied, transparency on black, {scaling}",
                False,
            ),
            *((str(step), self.resize) for step in timm_steps[:-1]),
            ("divide by 255", self.dtype == "uint8"),
            (f"subtract mean {list(p.mean)}, divide by std {list(p.std)}", self.normalize),
        ]
        found = versions()
        return {
            **p.to_dict(),
            "input": self.dtype,
            "layout": "NHWC" if self.dtype == "uint8" else "NCHW",
            "normalization_in_graph": self.normalize,
            "resize_in_graph": self.resize,
            "steps": [{"step": step, "in_graph": inside} for step, inside in steps],
            "versions": {name: found[name] for name in ("pillow", "timm") if name in found},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GraphInput:
        """Make it of what :meth:`to_dict` gave, or of a bundle of schema 1.

        Raises:
            InputError: the settings exclude each other, or a value is wrong.
        """
        fields = Preprocess.__dataclass_fields__
        return cls(
            Preprocess.from_dict({key: values[key] for key in fields if key in values}),
            values.get("input", "float"),
            values.get("normalization_in_graph", True),
            values.get("resize_in_graph", False),
        )


class Deployed(nn.Module):
    """A model as a graph holds it: its input's steps first, in evaluation mode.

    Args:
        model: takes normalised fp32 images [B, C, H, W], and perhaps further inputs.
        graph_input: the steps that run before the model; ``None``: none.
        dims: dimensions of one sample, channels included; 4 for volumes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, graph_input: GraphInput | None = None, dims: int = 3):
        super().__init__()
        self.model = model
        self.is_uint8 = graph_input is not None and graph_input.dtype == "uint8"
        self.normalize = graph_input is not None and graph_input.normalize
        if graph_input is not None and graph_input.normalize:
            device = next(model.parameters(), torch.empty(0)).device
            shape = (-1, *(1,) * (dims - 1))
            for name in ("mean", "std"):
                values = torch.tensor(getattr(graph_input.preprocess, name), device=device)
                self.register_buffer(name, values.view(shape))
        self.eval()

    def forward(self, images: Tensor, *others: Tensor) -> Tensor:
        """Normalise images and run the model."""
        if self.is_uint8:
            # The conversion first: TensorRT takes uint8 at the network's input only.
            images = images.float().movedim(-1, 1) / 255
        if self.normalize:
            images = (images - self.mean) / self.std
        return self.model(images, *others)


def insert_resize(graph: Any, preprocess: Preprocess) -> None:
    """Prepend timm's evaluation transform, resizing and cropping, to an onnx_ir graph.

    The graph's input, uint8 [batch, H, W, 3], then has any height and width. ONNX Runtime's filters
    are within one level in 256 of Pillow's, and equal for more than 99 % of the pixels. Images more
    than twice as tall as wide are further off: Pillow 13 filters their columns first, ONNX Runtime
    the rows, and each rounds and clips to [0, 255] in between.
    """
    import onnx_ir

    front = onnx_ir.from_onnx_text(_resize_text(preprocess)).graph
    old = graph.inputs[0]
    (new,), (resized,) = front.inputs, front.outputs
    new.name, old.name = old.name, "resize_old_input"
    onnx_ir.convenience.replace_all_uses_with(old, resized)
    nodes = list(front)
    front.inputs.clear()
    front.outputs.clear()
    front.remove(nodes)
    graph.inputs[0] = new
    graph.insert_before(graph[0], nodes)


def resize_as_graph(images: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Resize uint8 [B, H, W, 3] to [B, 3, h, w] as :func:`insert_resize` does in the graph."""
    import onnx.parser
    import onnxruntime

    model = onnx.parser.parse_model(_resize_text(preprocess))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.moveaxis(session.run(None, {NAME: images})[0], -1, 1)


def _resize_text(preprocess: Preprocess) -> str:
    """Write the graph that comes first: timm's Resize and CenterCrop, integer for integer.

    The shorter side becomes ``scale``, the longer one ``scale · longer // shorter`` ("squash": both
    sides ``scale``). The crop begins at ``round(excess / 2)``, ties to even, as in torchvision.
    """
    _, height, width = preprocess.input_size
    scale = [int(side / preprocess.crop_pct) for side in (height, width)]
    if preprocess.crop_mode == "squash":
        new_size = f"resize_new = Constant <value_ints = {scale}> ()"
    else:
        new_size = f"""resize_target = Constant <value_ints = [{scale[0]}]> ()
          resize_shorter = ReduceMin <keepdims = 1> (resize_size)
          resize_scaled = Mul (resize_size, resize_target)
          resize_new = Div (resize_scaled, resize_shorter)"""
    return f"""<ir_version: 10, opset_import: ["" : 20]>
        resize (uint8[{BATCH}, height, width, 3] {NAME}) =>
               (uint8[{BATCH}, {height}, {width}, 3] resize_out) {{
          resize_chw = Transpose <perm = [0, 3, 1, 2]> ({NAME})
          resize_rest = Shape <start = 0, end = 2> (resize_chw)
          resize_size = Shape <start = 2> (resize_chw)
          {new_size}
          resize_sizes = Concat <axis = 0> (resize_rest, resize_new)
          resize_image = Resize <antialias = 1, exclude_outside = 1,
            coordinate_transformation_mode = "half_pixel",
            {RESIZE_MODES[preprocess.interpolation]}> (resize_chw, , , resize_sizes)
          resize_crop = Constant <value_ints = [{height}, {width}]> ()
          resize_excess = Sub (resize_new, resize_crop)
          resize_excess_float = Cast <to = 1> (resize_excess)
          resize_half = Constant <value_float = 0.5> ()
          resize_margin = Mul (resize_excess_float, resize_half)
          resize_rounded = Round (resize_margin)
          resize_start = Cast <to = 7> (resize_rounded)
          resize_stop = Add (resize_start, resize_crop)
          resize_axes = Constant <value_ints = [2, 3]> ()
          resize_cropped = Slice (resize_image, resize_start, resize_stop, resize_axes)
          resize_out = Transpose <perm = [0, 2, 3, 1]> (resize_cropped)
        }}"""
