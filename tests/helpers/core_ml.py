"""A stand-in for coremltools: packages that hold PyTorch's program, and run it as Core ML would."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

PROGRAM, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"


def core_ml():
    """Make the module, with what fastadapt calls of it."""
    module = ModuleType("coremltools")
    module.convert = lambda program, **options: Package(program, options)
    module.ImageType = lambda **values: SimpleNamespace(kind="image", **values)
    module.TensorType = lambda **values: SimpleNamespace(kind="tensor", shape=(), **values)
    module.colorlayout = SimpleNamespace(RGB="RGB")
    module.target = SimpleNamespace(iOS16="iOS16")
    module.precision = SimpleNamespace(FLOAT32="fp32")
    module.transform = SimpleNamespace(FP16ComputePrecision=lambda op_selector: "fp16")
    module.ComputeUnit = SimpleNamespace(ALL="all", CPU_ONLY="cpu")
    module.models = SimpleNamespace(MLModel=Loaded)
    module.utils = SimpleNamespace(load_spec=lambda path: SimpleNamespace(description=spec(path)))
    return module


class Package:
    def __init__(self, program, options):
        assert options["convert_to"] == "mlprogram" and options["skip_model_load"]
        self.program, self.options, self.user_defined_metadata = program, options, {}

    def save(self, path):
        for name in (PROGRAM, WEIGHTS):
            (Path(path) / name).parent.mkdir(parents=True, exist_ok=True)
        with (Path(path) / WEIGHTS).open("wb") as file:
            torch.export.save(self.program, file)
        (Path(path) / PROGRAM).write_text(json.dumps(self.user_defined_metadata))
        image = self.options["inputs"][0]
        outputs = [value.name for value in self.options["outputs"]]
        results = [v.meta["val"] for v in self.program.graph.output_node().args[0]]
        content = {"inputs": {image.name: image.shape}, "precision": self.options}
        content["outputs"] = {n: list(v.shape) for n, v in zip(outputs, results, strict=True)}
        content["precision"] = self.options["compute_precision"]
        (Path(path) / "Manifest.json").write_text(json.dumps(content))
        (Path(path) / "executorch_debug_handle_mapping.json").write_text("{}")


def spec(path):
    content = json.loads((Path(path) / "Manifest.json").read_text())
    ((name, (_, _, height, width)),) = content["inputs"].items()
    colours = SimpleNamespace(Value=lambda name: name)
    image = SimpleNamespace(height=height, width=width, colorSpace="RGB", ColorSpace=colours)
    return SimpleNamespace(
        input=[SimpleNamespace(name=name, type=SimpleNamespace(imageType=image))],
        output=[
            SimpleNamespace(
                name=name, type=SimpleNamespace(multiArrayType=SimpleNamespace(shape=shape))
            )
            for name, shape in content["outputs"].items()
        ],
    )


class Loaded:
    def __init__(self, path, compute_units):
        if not (Path(path) / "Manifest.json").is_file():
            raise RuntimeError("A valid manifest does not exist")
        self.path = path
        with (Path(path) / WEIGHTS).open("rb") as file:
            self.module = torch.export.load(file).module()

    def get_spec(self):
        return SimpleNamespace(description=spec(self.path))

    def predict(self, given):
        (name,), (picture,) = given.keys(), given.values()
        image = self.get_spec().description.input[0].type.imageType
        assert (name, picture.mode) == ("images", "RGB")
        assert picture.size == (image.width, image.height)
        pixels = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None]
        outputs = self.module(pixels)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        names = [value.name for value in self.get_spec().description.output]
        return {n: v.detach().numpy() for n, v in zip(names, outputs, strict=True)}
