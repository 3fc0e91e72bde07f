"""A bundle as a model of Triton's Python backend, which calls :func:`fastadapt.export.load`.

Beside ONNX Runtime's and TensorRT's back ends, for servers that have neither, and for what only
PyTorch runs (a .pt2). The Python environment of the server must hold fastadapt. The interface of
``model.py`` is documented in triton-inference-server/python_backend.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fastadapt.files import write_text

BUNDLE, MODULE = "bundle", "model.py"

# Read by the server's own Python, without this package's layout around it.
SOURCE = '''"""Serve the bundle beside this file with Triton; written by fastadapt."""

import json
import os
import site
from pathlib import Path

# The server's interpreter ignores PYTHONPATH, by which a virtual environment can be named.
for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    site.addsitedir(folder)

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The graph's own inputs and outputs; the server batches requests."""

    def initialize(self, args):
        """Load the fastest file of the bundle that runs here."""
        import fastadapt as fa
        import torch

        config = json.loads(args["model_config"])
        self.inputs = [value["name"] for value in config["input"]]
        self.outputs = [value["name"] for value in config["output"]]
        device = "cuda" if args["model_instance_kind"] == "GPU" else "cpu"
        if device == "cuda":
            torch.cuda.set_device(int(args["model_instance_device_id"]))
        trust = config["parameters"].get("trust", {}).get("string_value") == "true"
        bundle = Path(args["model_repository"], args["model_version"], "bundle")
        self.predictor = fa.export.load(bundle, device=device, trust=trust)

    def execute(self, requests):
        """Answer requests that were batched: one call where their images have one size."""
        given = [self._arrays(request) for request in requests]
        if len({tuple(x.shape[1:] for x in arrays) for arrays in given}) == 1:
            return self._answers(given)
        return [answer for arrays in given for answer in self._answers([arrays])]

    def _arrays(self, request):
        tensors = (pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs)
        return [tensor.as_numpy() for tensor in tensors]

    def _answers(self, given):
        try:
            joined = [np.concatenate(arrays) for arrays in zip(*given)]
            outputs = self.predictor.runtime.outputs(*joined)
        except Exception as error:
            failed = pb_utils.TritonError(str(error))
            return [pb_utils.InferenceResponse(error=failed) for _ in given]
        ends = np.cumsum([len(arrays[0]) for arrays in given])[:-1]
        parts = zip(*(np.split(np.asarray(output), ends) for output in outputs))
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(n, np.ascontiguousarray(x)) for n, x in zip(self.outputs, part)]
            )
            for part in parts
        ]
'''


def write_version(folder: Path, bundle: Path) -> list[str]:
    """Write a version's files, the whole bundle among them.

    Args:
        folder: of the version, made anew.
        bundle: to be served.

    Returns:
        The files' names in the folder.
    """
    folder.mkdir()
    write_text(folder / MODULE, SOURCE)
    shutil.copytree(bundle, folder / BUNDLE)
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
