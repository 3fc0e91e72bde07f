"""Damaged manifests give one clear line before anything is allocated."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadapt.errors import InputError
from fastadapt.export.bundle.manifest import read_manifest
from fastadapt.export.bundle.schema import check_manifest
from fastadapt.files import seal

OLD = Path(__file__).parents[1] / "data" / "bundle_schema_2"
MANIFEST = json.loads((OLD / "manifest.json").read_text())


def changed(place, value):
    manifest = copy.deepcopy(MANIFEST)
    *way, last = place
    part = manifest
    for key in way:
        part = part[key]
    part[last] = value
    return manifest


def test_tasks_have_labels():
    manifest = {**MANIFEST, "tasks": [{"output": "logits", "kind": "classification"}]}
    with pytest.raises(InputError, match=r"lacks the key 'tasks\.0\.labels'"):
        check_manifest(manifest, "manifest.json")


@pytest.mark.parametrize("key", ["dtype", "shape"])
def test_inputs_and_outputs_are_whole(key):
    manifest = copy.deepcopy(MANIFEST)
    del manifest["model"]["outputs"][0][key]
    with pytest.raises(InputError, match="'logits' lacks its dtype or shape"):
        check_manifest(manifest, "manifest.json")


@pytest.mark.parametrize("key", ["stage", "batch", "samples"])
def test_rows_of_parity_are_whole(key):
    manifest = copy.deepcopy(MANIFEST)
    del manifest["artefacts"][0]["parity"][0][key]
    with pytest.raises(InputError, match=rf"lacks the key 'artefacts\.0\.parity\.0\.{key}'"):
        check_manifest(manifest, "manifest.json")


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("artefacts", 0, "details", "batch", "max"), 10**9, "less than or equal to 4096"),
        (("artefacts", 0, "details", "batch", "min"), 0, "greater than or equal to 1"),
        (("artefacts", 0, "details", "batch", "opt"), 64, "expected min ≤ opt ≤ max"),
        (("artefacts", 0, "details", "batch", "opt"), "8", "valid integer"),
        (("artefacts", 0, "details", "batch", "opt"), True, "valid integer"),
        (("artefacts", 0, "precision"), "int8", "model.onnx is an ONNX file in fp32"),
        (("artefacts", 0, "precision"), "fp64", "'fp32', 'fp16'"),
        (("artefacts", 0, "kind"), "pickle", "'onnx', 'openvino', 'tensorrt'"),
        (("artefacts", 0, "path"), "../m.onnx", "pattern"),
        (("artefacts", 0, "files"), ["a/b"], "pattern"),
        (("artefacts", 0, "parity", 0, "error"), float("nan"), "finite"),
        (("artefacts", 0, "speed"), {"x": {"1": float("inf")}}, "finite"),
        (("preprocessing", "input_size"), [3, 10**7, 10], "less than or equal to 65536"),
        (("preprocessing", "input_size"), [3, 10], "at least 3 items"),
        (("preprocessing", "crop_pct"), 1e-9, "greater than or equal to 0.01"),
        (("preprocessing", "input_size"), [3, 60000, 60000], "too large an image"),
        (("preprocessing", "input"), "int8", "'uint8' or 'float'"),
        (("artefacts", 0, "details", "batch", "extra"), 1, "extra inputs"),
        (("preprocessing", "std"), [0.0, 1.0, 1.0], "greater than 0"),
        (("model", "inputs"), [], "at least 1 item"),
        (("model", "inputs", 0, "shape"), [2**40], "less than or equal to 65536"),
        (("labels",), [1, 2], "valid string"),
        (("files", "model.onnx", "sha256"), "zz", "pattern"),
        (("files", "model.onnx", "bytes"), -1, "greater than or equal to 0"),
        (("accepted",), "yes", "valid boolean"),
    ],
)
def test_values_are_typed_and_bounded(place, value, says):
    with pytest.raises(InputError) as caught:
        check_manifest(changed(place, value), "manifest.json")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    check_manifest(MANIFEST, "manifest.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def places(part, way=()):
    yield way
    items = part.items() if isinstance(part, dict) else enumerate(part)
    if isinstance(part, dict | list):
        for key, inner in items:
            if isinstance(inner, dict | list):
                yield from places(inner, (*way, key))
            else:
                yield (*way, key)


PLACES = [place for place in places(MANIFEST) if place]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PLACES), VALUES, st.booleans())
def test_any_other_value_is_taken_or_named(tmp_path_factory, place, value, sealed):
    manifest = changed(place, value)
    if sealed:
        manifest = seal({**manifest, "schema": 3})
    folder = tmp_path_factory.mktemp("b")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        read_manifest(folder)
    except InputError as error:
        assert "\n" not in str(error).strip()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": "fastadapt-bundle", "schema": ' + "9" * 5000 + "}",
        '{"format": "fastadapt-bundle", "schema": -1}',
        '{"format": "fastadapt-bundle", "schema": true}',
        "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_text_that_is_no_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        read_manifest(tmp_path)
