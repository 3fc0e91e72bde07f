"""A bundle as a function of images, and as a model of Triton: the same answers as in training."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fastadapt as fa
from fastadapt.data.decode import load_image
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_timm, load, write_repository
from fastadapt.export import predictor as predictor_step
from fastadapt.export.backends.triton_server import to_pbtxt
from fastadapt.export.bundle.artefact import Artefact
from fastadapt.export.runtimes import RuntimeUnavailable
from fastadapt.files import read_json, sha256_file, write_json
from tests.helpers.imagesets import CLASSES, make_folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A fine-tuned timm model, images of many kinds, and bundles of it with every input."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made")
    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    torch.save(model.state_dict(), folder / "tuned.pth")
    make_folders(folder / "images", per_class=4)
    for name, settings in {
        "uint8": {},
        "float": {"input": "float", "normalize": False},
        "resize": {"resize": True},
    }.items():
        export_timm(
            "test_vit",
            folder / name,
            checkpoint=folder / "tuned.pth",
            image_size=32,
            images=folder / "images",
            class_names=CLASSES,
            speed=False,
            **settings,
        )
    write_pictures(folder / "pictures")
    return folder, model


def write_pictures(folder):
    """PNGs and a JPEG as people have them: gray, transparent, 16-bit, turned, of any size."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    for index, size in enumerate([(40, 30), (33, 90), (200, 150), (32, 32)]):
        patches = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = patches.resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"rgb{index}.png")
        image.convert("L").save(folder / f"gray{index}.png")
        alpha = Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8))
        image.putalpha(alpha)
        image.save(folder / f"alpha{index}.png")
    deep = rng.integers(0, 65536, (40, 50), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    patches.resize((60, 40)).save(folder / "turned.jpg", exif=exif)


class TestSameAsTraining:
    @pytest.mark.parametrize("name", ["uint8", "float", "resize"])
    def test_every_picture_gets_the_trained_models_label(self, made, name):
        folder, model = made
        paths = sorted((folder / "pictures").iterdir())
        preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg, input_size=(3, 32, 32))
        pixels = torch.stack([preprocess.read(path) for path in paths])
        with torch.no_grad():
            logits = model(preprocess.normalize(pixels)).numpy()
        found = load(folder / name)(paths)
        assert found.labels == [CLASSES[i] for i in logits.argmax(1)]
        assert len(set(found.labels)) > 1
        tolerance = 0.05 if name == "resize" else 1e-4
        np.testing.assert_allclose(found.logits, logits, atol=tolerance * logits.std())
        np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-6)


@pytest.fixture(scope="module")
def predict(made):
    return fa.export.load(made[0] / "uint8")


class TestImages:
    def test_every_way_to_give_an_image(self, predict, made):
        path = made[0] / "pictures" / "rgb0.png"
        image = load_image(path)
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
        want = predict(path).logits
        assert want.shape == (1, 3)
        for given in (str(path), image, array, tensor, [path], [image, array], (tensor,)):
            got = predict(given).logits
            np.testing.assert_allclose(got, np.repeat(want, len(got), 0), atol=1e-5)
        for given in (array[None].repeat(2, 0), torch.stack([tensor] * 3)):
            assert len(predict(given)) == len(given)

    def test_more_than_a_batch(self, predict, made):
        path = made[0] / "pictures" / "rgb0.png"
        found = predict([path] * 70)
        np.testing.assert_allclose(found.logits, found.logits[:1].repeat(70, 0), atol=1e-5)

    def test_sizes_may_differ_where_the_graph_resizes(self, made):
        predict = load(made[0] / "resize")
        paths = sorted((made[0] / "pictures").glob("rgb*.png"))
        together = predict(paths[::-1]).logits
        for path, row in zip(paths[::-1], together, strict=True):
            np.testing.assert_allclose(predict(path).logits[0], row, atol=1e-5)

    @pytest.mark.parametrize(
        "image,says",
        [
            (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\]; expected a uint8"),
            (np.zeros((8, 8), np.uint8), r"uint8 \[8, 8\]; expected"),
            (torch.zeros(8, 8, 3, dtype=torch.uint8), r"tensor \[3, H, W\]"),
            (3.0, "an image is a float"),
            ([], "no images"),
            ("gone.png", "gone.png does not exist"),
        ],
    )
    def test_what_is_no_image(self, predict, image, says):
        with pytest.raises(fa.InputError, match=says):
            predict(image)


class TestChoice:
    @pytest.fixture
    def bundle(self, made, tmp_path):
        """A bundle with a second file that runs, faster where the bundle was made."""
        for file in (made[0] / "uint8").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        fast = (tmp_path / "model.onnx").read_bytes()
        (tmp_path / "fast.onnx").write_bytes(fast)
        manifest = read_json(tmp_path / "manifest.json")
        speeds = {"model.onnx": 10.0, "fast.onnx": 20.0}
        manifest["artefacts"] = [
            Artefact(
                "onnx",
                name,
                "fp32",
                "verified",
                speed={"ONNX Runtime, CPU": {"1": speed}, "ONNX Runtime, CUDA": {"1": 1 / speed}},
                files=(name,),
                details={"batch": {"min": 4, "opt": 4, "max": 4}},
            ).to_dict()
            for name, speed in speeds.items()
        ]
        write_json(tmp_path / "manifest.json", manifest)
        return tmp_path

    def test_the_fastest_that_runs_here(self, bundle, made, monkeypatch):
        assert load(bundle, device="cpu").artefact.path == "fast.onnx"
        assert load(bundle, "model.onnx", device="cpu").artefact.path == "model.onnx"

        def only_one(path, *args, **kwargs):
            if path.name == "fast.onnx":
                raise RuntimeUnavailable("not here")
            return real(path, *args, **kwargs)

        real = predictor_step.load_runtime
        monkeypatch.setattr(predictor_step, "load_runtime", only_one)
        assert load(bundle, device="cpu").artefact.path == "model.onnx"

    def test_engines_of_fixed_batch_get_full_batches(self, bundle, made):
        path = made[0] / "pictures" / "rgb0.png"
        predict, plain = load(bundle, device="cpu"), load(made[0] / "uint8")
        sizes = []
        real = predict.runtime.run_arrays
        predict.runtime.run_arrays = lambda x: (sizes.append(len(x)), real(x))[1]
        np.testing.assert_allclose(predict([path] * 6).logits, plain([path] * 6).logits, atol=1e-5)
        assert sizes == [4, 4]

    def test_unverified_files_are_not_chosen(self, bundle):
        manifest = read_json(bundle / "manifest.json")
        for row in manifest["artefacts"]:
            row["status"] = "unverified"
        write_json(bundle / "manifest.json", manifest)
        with pytest.raises(fa.InputError, match=r"nothing in .* was verified"):
            load(bundle)

    def test_damage_and_unknown_files(self, bundle):
        with pytest.raises(fa.InputError, match=r"no model\.plan to run; it has model\.onnx, fast"):
            load(bundle, "model.plan")
        (bundle / "labels.txt").write_text("other")
        with pytest.raises(fa.InputError, match=r"labels\.txt has 5 bytes"):
            load(bundle)
        assert load(bundle, check=False, device="cpu").classes == CLASSES


def model_config(text):
    """Parsed by Triton's own schema, which tritonclient brings."""
    from google.protobuf import text_format

    (folder,) = importlib.util.find_spec("tritonclient").submodule_search_locations
    # Alone: the package around it needs gRPC.
    file = Path(folder, "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(text, module.ModelConfig()), module


class TestTriton:
    def test_the_schema_accepts_it(self, made, tmp_path):
        model = write_repository(made[0] / "uint8", tmp_path / "models")
        assert model == tmp_path / "models" / "uint8"
        files = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
        assert files == {"config.pbtxt", "labels.txt", "1/model.onnx"}
        onnx = made[0] / "uint8" / "model.onnx"
        assert (model / "1" / "model.onnx").read_bytes() == onnx.read_bytes()
        config, schema = model_config((model / "config.pbtxt").read_text())
        assert (config.name, config.platform, config.max_batch_size) == (
            "uint8",
            "onnxruntime_onnx",
            32,
        )
        (given,), (output,) = config.input, config.output
        assert (given.name, given.data_type, list(given.dims)) == (
            "images",
            schema.TYPE_UINT8,
            [32, 32, 3],
        )
        assert (output.name, output.data_type, list(output.dims), output.label_filename) == (
            "logits",
            schema.TYPE_FP32,
            [3],
            "labels.txt",
        )
        assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
        assert config.dynamic_batching.max_queue_delay_microseconds > 0
        assert [w.batch_size for w in config.model_warmup] == [1, 32]
        (warm_up,) = config.model_warmup[0].inputs.items()
        assert warm_up[0] == "images"
        assert warm_up[1].zero_data and list(warm_up[1].dims) == [32, 32, 3]
        preprocessing = json.loads(config.parameters["preprocessing"].string_value)
        assert preprocessing["mean"] == [0.5, 0.5, 0.5]

    @pytest.mark.parametrize(
        "name,dims,warm",
        [("float", [3, 32, 32], [3, 32, 32]), ("resize", [-1, -1, 3], [32, 32, 3])],
    )
    def test_other_inputs(self, made, tmp_path, name, dims, warm):
        model = write_repository(made[0] / name, tmp_path)
        config, _ = model_config((model / "config.pbtxt").read_text())
        assert list(config.input[0].dims) == dims
        assert list(config.model_warmup[0].inputs["images"].dims) == warm

    @pytest.fixture
    def with_engine(self, made, tmp_path):
        """A bundle as it is where TensorRT runs; the engine itself cannot be built here."""
        bundle = tmp_path / "my cells (v2)"
        bundle.mkdir()
        for file in (made[0] / "uint8").iterdir():
            (bundle / file.name).write_bytes(file.read_bytes())
        (bundle / "model.fp16.engine").write_bytes(b"plan")
        manifest = read_json(bundle / "manifest.json")
        engine = Artefact(
            "tensorrt",
            "model.fp16.engine",
            "fp16",
            "verified",
            files=("model.fp16.engine",),
            details={"batch": {"min": 1, "opt": 4, "max": 16}},
        )
        manifest["artefacts"].append(engine.to_dict())
        file = bundle / "model.fp16.engine"
        manifest["files"][file.name] = {"bytes": 4, "sha256": sha256_file(file)}
        write_json(bundle / "manifest.json", manifest)
        return bundle

    def test_tensorrt(self, with_engine, tmp_path):
        model = write_repository(with_engine, tmp_path / "models")
        assert model.name == "my_cells_v2_"
        assert (model / "1" / "model.plan").read_bytes() == b"plan"
        config, schema = model_config((model / "config.pbtxt").read_text())
        assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 16)
        assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
        assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
        again = write_repository(
            with_engine, tmp_path / "models", backend="onnxruntime", overwrite=True
        )
        assert {p.name for p in (again / "1").iterdir()} == {"model.onnx"}
        assert [p.name for p in (tmp_path / "models").iterdir()] == ["my_cells_v2_"]

    def test_what_cannot_be_served(self, made, with_engine, tmp_path):
        with pytest.raises(fa.InputError, match="no TensorRT engine: export with --trt"):
            write_repository(made[0] / "uint8", tmp_path / "m", backend="tensorrt")
        with pytest.raises(fa.InputError, match="expected onnxruntime or tensorrt"):
            write_repository(made[0] / "uint8", tmp_path / "m", backend="pytorch")
        assert not (tmp_path / "m").exists()
        manifest = read_json(with_engine / "manifest.json")
        manifest["artefacts"][-1]["details"]["batch"]["min"] = 4
        write_json(with_engine / "manifest.json", manifest)
        with pytest.raises(fa.InputError, match=r"at least 4 images .*--batch 1:OPT:MAX"):
            write_repository(with_engine, tmp_path / "m")

    def test_what_is_there_is_not_replaced(self, made, tmp_path):
        write_repository(made[0] / "uint8", tmp_path)
        with pytest.raises(fa.InputError, match="uint8 exists: replace it with --overwrite"):
            write_repository(made[0] / "uint8", tmp_path)
        write_repository(made[0] / "uint8", tmp_path, overwrite=True)
        (tmp_path / "float").mkdir()
        with pytest.raises(fa.InputError, match="is no Triton model"):
            write_repository(made[0] / "float", tmp_path, overwrite=True)

    def test_text_that_needs_quoting(self):
        text = to_pbtxt({"name": 'a "b" \\ ä\n', "max_batch_size": 1})
        config, _ = model_config(text)
        assert config.name == 'a "b" \\ ä\n'
