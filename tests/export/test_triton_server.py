"""A bundle as a model of Triton Inference Server."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import fastadapt as fa
from fastadapt.export import write_repository
from fastadapt.export.artefact import Artefact
from fastadapt.export.triton_server import to_pbtxt
from fastadapt.files import read_json
from tests.helpers.bundles import reseal


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


class TestRepository:
    def test_the_schema_accepts_it(self, tuned_bundles, tmp_path):
        model = write_repository(tuned_bundles[0] / "uint8", tmp_path / "models")
        assert model == tmp_path / "models" / "uint8"
        files = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
        assert files == {"config.pbtxt", "fastadapt.json", "labels.txt", "1/model.onnx"}
        onnx = tuned_bundles[0] / "uint8" / "model.onnx"
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
    def test_other_inputs(self, tuned_bundles, tmp_path, name, dims, warm):
        model = write_repository(tuned_bundles[0] / name, tmp_path)
        config, _ = model_config((model / "config.pbtxt").read_text())
        assert list(config.input[0].dims) == dims
        assert list(config.model_warmup[0].inputs["images"].dims) == warm

    @pytest.fixture
    def with_engine(self, tuned_bundles, tmp_path):
        """A bundle as it is where TensorRT runs; the engine itself cannot be built here."""
        bundle = tmp_path / "my cells (v2)"
        bundle.mkdir()
        shutil.copytree(tuned_bundles[0] / "uint8", bundle, dirs_exist_ok=True)
        (bundle / "model.fp16.engine").write_bytes(b"plan")
        (bundle / "model.fp16.engine.json").write_text("{}")
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
        reseal(bundle, artefacts=manifest["artefacts"])
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

    def test_what_cannot_be_served(self, tuned_bundles, with_engine, tmp_path):
        with pytest.raises(fa.InputError, match="no TensorRT engine: export with `trt=True`"):
            write_repository(tuned_bundles[0] / "uint8", tmp_path / "m", backend="tensorrt")
        with pytest.raises(fa.InputError, match="expected onnxruntime, tensorrt or python"):
            write_repository(tuned_bundles[0] / "uint8", tmp_path / "m", backend="pytorch")
        assert not (tmp_path / "m").exists()
        manifest = read_json(with_engine / "manifest.json")
        manifest["artefacts"][-1]["details"]["batch"]["min"] = 4
        reseal(with_engine, artefacts=manifest["artefacts"])
        with pytest.raises(fa.InputError, match=r"at least 4 images .*`batch=1:OPT:MAX`"):
            write_repository(with_engine, tmp_path / "m")

    def test_the_same_model_gets_a_version(self, tuned_bundles, tmp_path):
        model = write_repository(tuned_bundles[0] / "uint8", tmp_path)
        (model / "1" / "model.onnx").write_text("older weights")
        (model / "7").mkdir()  # the user's
        edited = (model / "config.pbtxt").read_text() + "# more instances\n"
        (model / "config.pbtxt").write_text(edited)
        for overwrite in (False, True):
            write_repository(tuned_bundles[0] / "uint8", tmp_path, overwrite=overwrite)
        assert (model / "1" / "model.onnx").read_text() == "older weights"
        onnx = (tuned_bundles[0] / "uint8" / "model.onnx").read_bytes()
        for version in ("8", "9"):
            assert (model / version / "model.onnx").read_bytes() == onnx
        assert (model / "config.pbtxt").read_text() == edited
        assert {p.name for p in model.iterdir()} == {
            *("1", "7", "8", "9"),
            *("config.pbtxt", "fastadapt.json", "labels.txt"),
        }

    def test_another_model_is_replaced_only_if_all_of_it_was_written_here(
        self, tuned_bundles, tmp_path
    ):
        other = shutil.copytree(tuned_bundles[0] / "float", tmp_path / "uint8")
        model = write_repository(tuned_bundles[0] / "uint8", tmp_path / "m")
        with pytest.raises(fa.InputError, match=r"another configuration .* `overwrite=True`"):
            write_repository(other, tmp_path / "m")
        (model / "1" / "notes.txt").touch()
        with pytest.raises(fa.InputError, match=r"uint8 holds 1/notes.txt"):
            write_repository(other, tmp_path / "m", overwrite=True)
        (model / "1" / "notes.txt").unlink()
        write_repository(other, tmp_path / "m", overwrite=True)
        assert "TYPE_FP32" in (model / "config.pbtxt").read_text().partition("output")[0]
        assert [p.name for p in (tmp_path / "m").iterdir()] == ["uint8"]

    def test_models_of_others_stay(self, tuned_bundles, tmp_path):
        for name, files in {"uint8": ("config.pbtxt", "1/model.onnx"), "float": ("notes",)}.items():
            for file in files:
                (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name / file).write_text("theirs")
        (tmp_path / "resize").symlink_to("uint8")
        says = {"uint8": "was not written here", "float": "is no Triton model", "resize": "a link"}
        for name, said in says.items():
            with pytest.raises(fa.InputError, match=said):
                write_repository(tuned_bundles[0] / name, tmp_path, overwrite=True)
        found = {p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
        assert found == {"theirs"} and len(list(tmp_path.iterdir())) == 3

    def test_text_that_needs_quoting(self):
        text = to_pbtxt({"name": 'a "b" \\ ä\n', "max_batch_size": 1})
        config, _ = model_config(text)
        assert config.name == 'a "b" \\ ä\n'
