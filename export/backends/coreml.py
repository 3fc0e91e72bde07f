"""Core ML: a folded model as an .mlpackage, for iPhones, iPads and Macs.

PyTorch exports the model, and coremltools converts it to an ML program, on any system. The input is
an image, as an app's camera and Vision give it: one at a time, its bytes; what ``images`` takes in
the bundle's other files is computed inside. Only macOS can run the file, so that elsewhere its
interface alone is checked: it is read back, and names, sizes and classes are compared.

In fp16, coremltools casts what has three dimensions or more. What few numbers decide (cluster
attention's mixture, the pooled features, the head) stays in fp32, since there is no measuring what
it would cost.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.errors import InputError, first_line

from ..settings import Batches
from .tracing import plain_attention, plainer, quiet, silent_stderr

SUFFIX = "mlpackage"
OLDEST = "iOS16"  # and macOS 13: coremltools' name of the oldest system that runs the file
CONTENTS = "Manifest.json"  # of the folder, which lists the program and its weights
DEBUG_FILE = "executorch_debug_handle_mapping.json"  # coremltools' own, of no use to an app
LEAST_FP16_RANK = 3


def load_coremltools() -> Any:
    """Import coremltools, which warns of all that it has not been tested with.

    Raises:
        InputError: it is not installed, or cannot be loaded.
    """
    with quiet("coremltools"), silent_stderr():
        try:
            return importlib.import_module("coremltools")
        except ModuleNotFoundError as error:
            if error.name != "coremltools":
                raise
            raise InputError(
                "the package coremltools is not installed: pip install 'fastadapt[coreml]'"
            ) from error
        except (ImportError, OSError) as error:
            raise InputError(
                f"the package coremltools cannot be loaded: {first_line(error)}"
            ) from error


class FromImage(nn.Module):
    """A bundle's graph with the input that Core ML makes of an image.

    Args:
        model: takes images as the bundle's files do: uint8 [1, H, W, 3], or fp32 [1, 3, H, W] in
            [0, 1].
        takes_bytes: which of the two.
    """

    def __init__(self, model: nn.Module, takes_bytes: bool):
        super().__init__()
        self.model, self.takes_bytes = model, takes_bytes

    def forward(self, images: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model on an image, fp32 [1, 3, H, W], from 0 to 255."""
        # The model's own steps follow: it converts bytes to floats, and these are floats already.
        images = images.movedim(1, -1) if self.takes_bytes else images / 255
        return self.model(images, *others)


@torch.no_grad()
def convert(
    model: nn.Module,
    example: tuple[Tensor, ...],
    path: str | Path,
    batch: Batches,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
    precision: Literal["fp32", "fp16"] = "fp32",
) -> dict[str, Any]:
    """Write a model, on the CPU and in fp32, as an ML program for single images.

    Args:
        model: ordinary operators only; maps inputs like ``example`` to one tensor or several.
        example: inputs with any batch: images first, uint8 [B, H, W, 3] or fp32 [B, 3, H, W] in
            [0, 1].
        path: of the folder; ends in ``.mlpackage``.
        batch: the sizes that the runtime, which computes image by image, is compared at.
        inputs: names, in the order of ``example``.
        outputs: names, in the order of the model's.
        metadata: kept in the file, as an ONNX file keeps it.
        precision: of what is between.

    Returns:
        The manifest's details of the file.

    Raises:
        InputError: coremltools is not installed, or does not take the model; with its reason.
    """
    tools = load_coremltools()
    path = Path(path)
    images, *others = (x[:1].contiguous() for x in example)
    if images.ndim != 4:
        raise InputError("Core ML takes images, not volumes: leave out `coreml`")
    expected = model(images, *others)
    widths = [x.shape[1] for x in ((expected,) if isinstance(expected, Tensor) else expected)]
    takes_bytes = images.dtype == torch.uint8
    pixels = images.movedim(-1, 1).float() if takes_bytes else 255 * images
    given = (pixels.contiguous(), *others)
    hidden = (quiet("coremltools"), plain_attention(model), silent_stderr())
    with contextlib.ExitStack() as stack:
        for context in hidden:
            stack.enter_context(context)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            program = torch.export.export(FromImage(model, takes_bytes).eval(), given)
            program = torch.export.export(plainer(program), given).run_decompositions({})
            _drop_aliases(program.graph_module)
            package = tools.convert(
                program,
                convert_to="mlprogram",
                inputs=_inputs(tools, inputs, given),
                outputs=[tools.TensorType(name=name, dtype=np.float32) for name in outputs],
                minimum_deployment_target=getattr(tools.target, OLDEST),
                compute_precision=_precision(tools, precision),
                skip_model_load=True,
            )
            package.user_defined_metadata.update(metadata)
            _save(package, path)
        except OSError:
            raise
        except Exception as error:  # its passes' exceptions have no common base
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"Core ML cannot convert the model: {reason}") from error
    sizes = dict(zip(outputs, widths, strict=True))
    shapes = {name: tuple(x.shape) for name, x in zip(inputs, given, strict=True)}
    check_interface(path, shapes, sizes)
    return {
        "library": "coremltools",
        "version": importlib.metadata.version("coremltools"),
        "batch": batch.to_dict(),
        "images_at_once": 1,
        "input": {"name": inputs[0], "kind": "RGB image", "size": list(pixels.shape[2:])},
        "outputs": sizes,
        "targets": [f"{OLDEST}, macOS 13 and newer"],
    }


def check_interface(
    path: str | Path, inputs: Mapping[str, tuple[int, ...]], outputs: Mapping[str, int]
) -> None:
    """Read a file back, and compare what an app sees of it with what it is to have.

    Args:
        path: of the folder.
        inputs: shapes by name, of one sample, in order; the first is the image, [1, 3, H, W].
        outputs: widths by name, in order.

    Raises:
        InputError: something is not as it should be.
    """
    path = Path(path)
    with quiet("coremltools"), silent_stderr():
        description = load_coremltools().utils.load_spec(str(path)).description
    first, *others = description.input
    image = first.type.imageType
    found: dict[str, tuple[int, ...]] = {first.name: (1, 3, image.height, image.width)}
    found |= {value.name: tuple(value.type.multiArrayType.shape) for value in others}
    rgb = image.ColorSpace.Value("RGB")
    if list(found.items()) != list(inputs.items()) or image.colorSpace != rgb:
        raise InputError(f"{path.name} takes {found}; expected {dict(inputs)}")
    given = {v.name: tuple(v.type.multiArrayType.shape) for v in description.output}
    expected = {name: (1, width) for name, width in outputs.items()}
    if list(given.items()) != list(expected.items()):
        raise InputError(f"{path.name} gives {given}; expected {expected}")


def package_files(path: Path) -> tuple[str, ...]:
    """Return the names of the files in a package, with the folder's."""
    files = (file for file in path.rglob("*") if file.is_file())
    return tuple(sorted(f"{path.name}/{file.relative_to(path).as_posix()}" for file in files))


def _drop_aliases(module: Any) -> None:
    """Take out what passes a tensor on as it is (in Swin, for one), which coremltools lacks."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.alias.default and "output" not in {
            user.op for user in node.users
        }:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()


def _inputs(tools: Any, names: Sequence[str], given: Sequence[Tensor]) -> list[Any]:
    first, *others = zip(names, given, strict=True)
    layout = tools.colorlayout.RGB
    return [
        tools.ImageType(name=first[0], shape=tuple(first[1].shape), color_layout=layout),
        *(
            tools.TensorType(name=name, shape=tuple(x.shape), dtype=np.float32)
            for name, x in others
        ),
    ]


def _precision(tools: Any, precision: str) -> Any:
    if precision == "fp32":
        return tools.precision.FLOAT32

    def is_cast(op: Any) -> bool:
        ranks = [getattr(output, "rank", 0) for output in op.outputs]
        return min(ranks, default=0) >= LEAST_FP16_RANK

    return tools.transform.FP16ComputePrecision(op_selector=is_cast)


def _save(package: Any, path: Path) -> None:
    """Write a package's folder under a temporary name, readable as other files are; rename it."""
    umask = os.umask(0)
    os.umask(umask)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        whole = Path(temporary) / path.name
        package.save(str(whole))
        (whole / DEBUG_FILE).unlink(missing_ok=True)
        for file in (whole, *whole.rglob("*")):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
        if path.exists():
            shutil.rmtree(path)
        whole.rename(path)
