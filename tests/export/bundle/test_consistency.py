"""What a bundle says twice it says alike; every lie is found by verify and by load."""

import json
import shutil

import numpy as np
import onnx
import pytest

import fastadapt as fa
from fastadapt.export import load, verify_bundle
from fastadapt.export.bundle.consistency import check_labels
from fastadapt.files import read_json, write_json
from tests.helpers.bundles import reseal


@pytest.fixture
def bundle(made, tmp_path):
    return shutil.copytree(made / "bundle", tmp_path / "b")


def refused(bundle, says):
    with pytest.raises(fa.InputError, match=says):
        verify_bundle(bundle, speed=False)
    with pytest.raises(fa.InputError, match=says):
        load(bundle)


class TestLabels:
    def test_of_labels_txt(self, bundle):
        (bundle / "labels.txt").write_text("good\ncrack\n")
        reseal(bundle)
        refused(bundle, r"class names of manifest\.json and of labels\.txt differ")

    def test_of_the_manifest(self, bundle):
        (bundle / "labels.txt").write_text("good\ncrack\n")
        task = {"output": "logits", "kind": "classification", "labels": ["good", "crack"]}
        reseal(bundle, labels=["good", "crack"], tasks=[task])
        refused(bundle, r"class names of manifest\.json and of model\.onnx's metadata differ")

    def test_of_the_task(self, bundle):
        task = {"output": "logits", "kind": "classification", "labels": ["good", "crack"]}
        reseal(bundle, tasks=[task])
        refused(bundle, "first task has other labels")

    def test_their_number(self, bundle):
        labels = ["a", "b", "c"]
        task = {"output": "logits", "kind": "classification", "labels": labels}
        (bundle / "labels.txt").write_text("a\nb\nc\n")
        reseal(bundle, labels=labels, tasks=[task])
        refused(bundle, "names 3 classes; the model has 2 outputs")
        model = read_json(bundle / "manifest.json")["model"]
        model["outputs"][0]["shape"] = ["batch", 3]
        set_metadata(bundle, labels=json.dumps(labels))
        reseal(bundle, labels=labels, tasks=[task], model=model)
        refused(bundle, r"names 3 classes; model\.onnx has 2 outputs")

    @pytest.mark.parametrize("label", ["a\nb", "a\r", "a\u2028b", "a\x85b", "", " "])
    def test_a_separator_in_a_name(self, label):
        with pytest.raises(fa.InputError, match="is empty or holds a line break"):
            check_labels(["good", label])
        check_labels(["Größe 5 µm", "a,b;c\td", "x" * 300])


def set_metadata(bundle, **values):
    model = onnx.load(bundle / "model.onnx")
    for entry in model.metadata_props:
        entry.value = values.get(entry.key, entry.value)
    onnx.save(model, bundle / "model.onnx")


class TestPreprocessing:
    def test_of_the_metadata(self, bundle):
        preprocessing = read_json(bundle / "manifest.json")["preprocessing"]
        reseal(bundle, preprocessing={**preprocessing, "interpolation": "bilinear"})
        refused(bundle, r"preprocessing of manifest\.json and of model\.onnx's metadata differ")

    @pytest.mark.parametrize(
        "change", [{"interpolation": "bilinear"}, {"crop_pct": 0.5}, {"crop_mode": "squash"}]
    )
    def test_verify_goes_the_whole_way_from_pixels(self, bundle, change):
        """Even where manifest and metadata were both changed, and all was hashed again."""
        preprocessing = {**read_json(bundle / "manifest.json")["preprocessing"], **change}
        set_metadata(bundle, preprocessing=json.dumps(preprocessing))
        reseal(bundle, preprocessing=preprocessing)
        with pytest.raises(fa.InputError, match=r"makes other pixels of golden/\d\d\.png"):
            verify_bundle(bundle, speed=False)


class TestContent:
    def test_the_manifest_hashes_itself(self, bundle):
        manifest = read_json(bundle / "manifest.json")
        for key, value in {"compared_on": "x", "limits": {"int8_budget": 0.5}}.items():
            write_json(bundle / "manifest.json", {**manifest, key: value})
            refused(bundle, r"manifest\.json was changed: its content")
        (bundle / "manifest.json").write_text(json.dumps(manifest, indent=7))  # layout alone
        assert verify_bundle(bundle, speed=False).passed

    def test_links_and_what_is_not_listed(self, bundle, tmp_path):
        (bundle / "model.onnx").rename(tmp_path / "model.onnx")
        (bundle / "model.onnx").symlink_to(tmp_path / "model.onnx")
        refused(bundle, r"model\.onnx is a link")
        (bundle / "model.onnx").unlink()
        (tmp_path / "model.onnx").rename(bundle / "model.onnx")
        (bundle / "golden").rename(tmp_path / "golden")
        (bundle / "golden").symlink_to(tmp_path / "golden")
        refused(bundle, r"golden/00\.png is a link")

    def test_a_file_that_runs_must_be_listed(self, bundle):
        manifest = read_json(bundle / "manifest.json")
        shutil.copy(bundle / "model.onnx", bundle / "other.onnx")
        row = {**manifest["artefacts"][0], "path": "other.onnx", "files": []}
        reseal(bundle, list_again=False, artefacts=[*manifest["artefacts"], row])
        refused(bundle, r"lists no other\.onnx")
        with pytest.raises(fa.InputError, match=r"lists no other\.onnx"):
            load(bundle, "other.onnx", check=False)

    def test_weights_beside_a_graph_must_be_its_own(self, bundle):
        model = onnx.load(bundle / "model.onnx")
        onnx.save(
            model,
            bundle / "model.onnx",
            save_as_external_data=True,
            location="weights.bin",
            size_threshold=0,
        )
        reseal(bundle)
        refused(bundle, r"reads 'weights\.bin', which the manifest does not list")


def test_golden_samples_of_other_rows(bundle):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(bundle / "golden.safetensors")
    tensors["images"] = np.ascontiguousarray(tensors["images"][:3])
    save_file(tensors, bundle / "golden.safetensors")
    reseal(bundle)
    with pytest.raises(fa.InputError, match="has 3 rows of 'images' and 16 of 'expected'"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"opset": 19}, "the opset of"),
        (
            {"inputs": [{"name": "images", "dtype": "uint8", "shape": ["batch", 32, 32, 4]}]},
            "inputs",
        ),
        (
            {"inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", 32, 32, 3]}]},
            "inputs",
        ),
        ({"outputs": [{"name": "scores", "dtype": "float32", "shape": ["batch", 2]}]}, "outputs"),
    ],
)
def test_what_the_graph_contradicts(bundle, change, says):
    reseal(bundle, model={**read_json(bundle / "manifest.json")["model"], **change})
    refused(bundle, rf"{says}.*manifest\.json and of model\.onnx differ")


@pytest.mark.parametrize("key", ["opset", "outputs"])
def test_what_the_graph_could_contradict_is_demanded(bundle, key):
    model = read_json(bundle / "manifest.json")["model"]
    del model[key]
    reseal(bundle, model=model)
    refused(bundle, "'model' lacks its opset or outputs")
