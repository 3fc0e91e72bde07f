"""Several runs as tasks of one graph, from images to labels; and runs that cannot share one."""

import importlib.util
import shutil

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.export import BatchPredictor, EngineOptions, export_tasks, load
from fastadapt.export.artefact import UNVERIFIED, VERIFIED
from fastadapt.export.bundle import material
from fastadapt.export.bundle.samples import Sample, Samples, merge_samples
from fastadapt.export.bundle.task_runs import load_tasks
from fastadapt.export.bundle.verify import verify_bundle
from fastadapt.export.parity import GateError
from fastadapt.export.precision import int8
from fastadapt.export.settings import Batches
from fastadapt.export.triton_server import write_repository
from fastadapt.files import read_json, seal, write_json
from fastadapt.gdpl.checkpoint import FORMAT as GDPL_FORMAT
from fastadapt.lora import LoRAConfig
from tests.export.conftest import SIZE, write_images
from tests.helpers.bundles import reseal
from tests.helpers.command import command
from tests.helpers.shallow_models import SHALLOW_VIT

TASKS = {"grade": ["low", "mid", "high"], "artifact": ["no", "yes"]}
ADAPTERS = {
    "grade": {"rank": 8, "num_centers": 3},
    "artifact": {"adapter": "none", "pool": "token"},  # a linear probe of the class token
}
THRESHOLD = {"criterion": "youden", "threshold": 0.45}


def save_run(folder, name, weights, rows, **settings):
    """Write what training leaves of a task's run; classes go round with the images."""
    config = fa.AdaptConfig(input_size=SIZE, **{**ADAPTERS[name], **settings})
    model = fa.adapt(SHALLOW_VIT, config, len(TASKS[name]), weights=str(weights))
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg).to_dict()
    more = {"decision": THRESHOLD} if name == "artifact" else {}
    fa.save_adapter(model, folder, labels=TASKS[name], preprocess=preprocess, **more)
    labels = TASKS[name]
    lines = [f"{p},{labels[i % len(labels)]},{split}\n" for i, (p, _, split) in enumerate(rows)]
    (folder / "splits.csv").write_text("path,label,split\n" + "".join(lines))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs on one backbone, and their bundle."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tasks")
    rows = write_images(folder / "images")
    backbone = timm.create_model(SHALLOW_VIT, num_classes=0, img_size=32)
    torch.save(backbone.state_dict(), folder / "weights.pth")
    for name in TASKS:
        save_run(folder / name, name, folder / "weights.pth", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadapt.export.bundle.build.measure", lambda *args: {"1": 1.0})
        export_tasks([folder / name for name in TASKS], folder / "bundle")
    return folder


@pytest.fixture
def bundle(made, tmp_path):
    return shutil.copytree(made / "bundle", tmp_path / "bundle")


@pytest.fixture
def wrong_task(made, monkeypatch):
    """Export one weight of the second task wrong."""

    def wrong(folded, path, **kwargs):
        model = onnx.load(made / "bundle" / "model.onnx")
        weight = next(t for t in model.graph.initializer if list(t.dims) == [2, 64])
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0, 0] += 0.1
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, path)
        described = read_json(made / "bundle" / "manifest.json")["model"]
        return {key: described[key] for key in ("opset", "inputs", "outputs")}

    monkeypatch.setattr(material, "export_onnx", wrong)


@pytest.fixture
def exported_before(made, monkeypatch):
    """Copy the ONNX file of the runs' bundle, instead of exporting it anew."""

    def copy(folded, path, **kwargs):
        shutil.copy(made / "bundle" / "model.onnx", path)
        described = read_json(made / "bundle" / "manifest.json")["model"]
        return {key: described[key] for key in ("opset", "inputs", "outputs")}

    monkeypatch.setattr(material, "export_onnx", copy)


def images_of(made):
    return sorted((made / "images").rglob("*.png"))[:7]


class TestBundle:
    def test_each_task_answers_as_its_own_run(self, made):
        predict, paths = load(made / "bundle"), images_of(made)
        found = predict(paths)
        preprocess = predict.graph_input.preprocess
        pixels = preprocess.normalize(torch.stack([preprocess.read(path) for path in paths]))
        for name, labels in TASKS.items():
            with torch.no_grad():
                logits = fa.load_adapter(made / name)(pixels).numpy()
            assert found[name].logits == pytest.approx(logits, rel=1e-3, abs=1e-4)
            if name == "grade":
                assert found[name].labels == [labels[i] for i in logits.argmax(1)]
        over = found["artifact"].probabilities[:, 1] > THRESHOLD["threshold"]
        assert found["artifact"].labels == np.where(over, "yes", "no").tolist()
        rows = list(predict.iter([*paths, made / "none.png"], workers=1))
        assert [row["grade"].label for row in rows[:-1]] == found["grade"].labels
        assert rows[-1].problem is not None
        with pytest.raises(InputError, match=r"several tasks \(grade, artifact\), each"):
            _ = found.labels
        with pytest.raises(InputError, match="no task 'size'; expected one of grade, artifact"):
            found["size"]

    def test_the_backbone_is_in_the_file_once(self, made):
        graph = onnx.load(made / "bundle" / "model.onnx").graph
        # One for each of the backbone's two blocks, and one of the adapter.
        assert len([node for node in graph.node if node.op_type == "Softmax"]) == 3
        backbone = timm.create_model(SHALLOW_VIT, num_classes=0, img_size=32)
        size = 4 * sum(p.numel() for p in backbone.parameters())
        adapters = sum((made / name / "adapter.safetensors").stat().st_size for name in TASKS)
        weights = sum(len(tensor.raw_data) for tensor in graph.initializer)
        assert size < weights < size + adapters + 10_000
        assert (made / "bundle" / "model.onnx").stat().st_size < 1.5 * size

    def test_what_the_bundle_says(self, made):
        manifest = read_json(made / "bundle" / "manifest.json")
        assert manifest["schema"] == 4 and manifest["labels"] == []
        assert [task["name"] for task in manifest["tasks"]] == list(TASKS)
        grade, artifact = manifest["tasks"]
        assert grade["labels"] == TASKS["grade"] and artifact["decision"]["threshold"] == 0.45
        assert grade["source"]["run"] == str(made / "grade")
        stages = {parity["stage"] for parity in manifest["parity"]}
        for stage in ("folding", "ONNX Runtime", "end to end"):
            assert {f"{stage}, grade", f"{stage}, artifact"} <= stages
        golden = load_file(made / "bundle" / "golden.safetensors")
        assert golden["expected:grade"].shape == (16, 3)
        report = (made / "bundle" / "report.html").read_text()
        for text in ("<h2>Tasks</h2>", "low, mid, high", "How good the model is: artifact"):
            assert text in report
        assert verify_bundle(made / "bundle", speed=False).passed

    def test_predicted_columns(self, made, tmp_path, monkeypatch, capfd):
        given = ("predict", made / "bundle", made / "images", "--workers", 1, "--out")
        assert command(monkeypatch, *given, tmp_path / "all.csv") == 0
        head, first, *_ = (tmp_path / "all.csv").read_text().splitlines()
        assert head == (
            "path,prediction:grade,probabilities:grade_low,probabilities:grade_mid,"
            "probabilities:grade_high,prediction:artifact,probabilities:artifact_no,"
            "probabilities:artifact_yes"
        )
        assert command(monkeypatch, *given, tmp_path / "one.csv", "--task", "artifact") == 0
        one = (tmp_path / "one.csv").read_text().splitlines()
        assert one[0] == "path,prediction,probabilities_no,probabilities_yes"
        assert one[1].split(",")[1:] == first.split(",")[5:]
        table = tmp_path / "table.csv"
        lines = [f"{path},{TASKS['grade'][i % 3]}\n" for i, path in enumerate(images_of(made))]
        table.write_text("path,grade\n" + "".join(lines))
        scored = ("predict", made / "bundle", table, "--workers", 1, "--labels", "grade")
        assert command(monkeypatch, *scored, "--out", tmp_path / "a.csv", "--task", "grade") == 0
        assert "(7 labelled images)" in capfd.readouterr().out
        for more, says in (
            ((*scored, "--out", tmp_path / "b.csv"), "--labels are of one task: name it with"),
            ((*given, tmp_path / "b.csv", "--embeddings"), "several tasks, whose adapters have"),
            ((*given, tmp_path / "b.csv", "--task", "x"), "no task 'x'; expected one of grade"),
        ):
            assert command(monkeypatch, *more) != 0
            assert says in capfd.readouterr().err
        columns = BatchPredictor(str(made / "bundle"))({"path": images_of(made)[:2]})
        assert columns["probabilities:grade"].shape == (2, 3)

    def test_triton_gets_an_output_of_each_task(self, made, tmp_path):
        model = write_repository(made / "bundle", tmp_path)
        config = (model / "config.pbtxt").read_text()
        for name, labels in TASKS.items():
            assert f'name: "{name}"' in config and f'"labels.{name}.txt"' in config
            assert (model / f"labels.{name}.txt").read_text().split() == labels


# Options, the package they need, and the files they write.
FORMATS = {
    "openvino": ("openvino", ["model.fp32.xml", "model.int8.xml"]),
    "trt": ("tensorrt_rtx", ["model.fp32.engine", "model.int8.onnx", "model.int8.engine"]),
    "executorch": ("executorch", ["model.fp32.pte", "model.int8.pte"]),
    "litert": ("litert_torch", ["model.fp32.tflite", "model.int8.tflite"]),
    "coreml": ("coremltools", ["model.fp32.mlpackage"]),
}


@pytest.fixture
def kept_int8(monkeypatch):
    """Keep INT8 of a model that is too small to be faster in it."""
    monkeypatch.setattr(int8, "speeds_in_turns", lambda *args: (1.0, 2.0))
    return {"int8": True, "int8_budget": 0.5}


def test_every_format_answers_for_each_task(made, tmp_path, kept_int8, exported_before):
    wanted = {
        option: files
        for option, (package, files) in FORMATS.items()
        if importlib.util.find_spec(package)
    }
    if not wanted:
        pytest.skip("no package of another format is installed")
    if "trt" in wanted:
        kept_int8["targets"] = ("sm_89",)
    # One colour an image: outputs differ by more than the steps of INT8.
    (tmp_path / "images").mkdir()
    for index in range(16):
        colour = tuple(17 * (index * factor % 16) for factor in (1, 5, 7))
        Image.new("RGB", SIZE[1:], colour).save(tmp_path / "images" / f"{index}.png")
    found = export_tasks(
        [made / name for name in TASKS],
        tmp_path / "bundle",
        images=tmp_path / "images",
        engines=EngineOptions(**dict.fromkeys(wanted, True), **kept_int8, batch=Batches(1, 2, 4)),
        speed=False,
    )
    check_formats(tmp_path / "bundle", found.manifest["artefacts"][1:], wanted, list(TASKS))
    assert verify_bundle(tmp_path / "bundle", speed=False).passed


def check_formats(bundle, entries, wanted, names):
    """Hold every file against model.onnx, task by task."""
    files = sorted((bundle.parent / "images").iterdir())[:5]
    expected = load(bundle, "model.onnx")(files)
    assert {a["path"] for a in entries} == {file for files in wanted.values() for file in files}
    for entry in entries:
        path, int8_file = entry["path"], entry["precision"] == "int8"
        if path.endswith(".engine"):
            outputs = read_json(bundle / f"{path}.json")["outputs"]
            assert [output["name"] for output in outputs] == names
        if entry["kind"] == "coreml":
            assert list(entry["details"]["outputs"]) == names
        if path in (*FORMATS["trt"][1], *FORMATS["coreml"][1]):  # there is no GPU or Mac for it
            assert entry["status"] == UNVERIFIED
            continue
        assert entry["status"] == VERIFIED
        assert {parity["stage"].rpartition(", ")[2] for parity in entry["parity"]} == set(names)
        assert not int8_file or entry["details"]["judgement"]["task"] in names
        predicted = load(bundle, path)(files)
        for name in names:
            allowed = float(np.ptp(expected[name].logits)) / 2 if int8_file else 1e-4
            assert predicted[name].logits == pytest.approx(expected[name].logits, abs=allowed)


class TestDamage:
    def test_swapped_labels(self, bundle):
        manifest = read_json(bundle / "manifest.json")
        manifest["tasks"][1]["labels"].reverse()
        reseal(bundle, tasks=manifest["tasks"])
        with pytest.raises(InputError, match=r"class names of .* and of labels\.artifact\.txt"):
            verify_bundle(bundle, speed=False)
        (bundle / "labels.artifact.txt").write_text("yes\nno\n")
        reseal(bundle, tasks=manifest["tasks"])
        with pytest.raises(InputError, match=r"tasks of .* and of model\.onnx's metadata differ"):
            load(bundle)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda m: m["tasks"].reverse(), "'tasks' are not the outputs of the graph"),
            (lambda m: m["tasks"].pop(), "fewer than two tasks"),
            (lambda m: m["tasks"][0].update(name="Artifact"), "two tasks have the same name"),
            (lambda m: m["tasks"][0].update(labels=[]), "'grade' lacks classes"),
            (lambda m: m.update(labels=["a"]), "'labels' stand with each"),
            (lambda m: m.update(schema=3), "which schema 4 brought"),
            (lambda m: m["tasks"][0]["labels"].pop(), "labels.grade.txt differ"),
        ],
    )
    def test_manifests_that_cannot_be(self, bundle, change, says):
        manifest = read_json(bundle / "manifest.json")
        change(manifest)
        reseal(bundle, **manifest)
        with pytest.raises(InputError, match=says):
            verify_bundle(bundle, speed=False)

    def test_golden_samples_of_a_task(self, bundle):
        tensors = load_file(bundle / "golden.safetensors")
        tensors["expected:artifact"] = tensors["expected:artifact"].flip(1).contiguous()
        save_file(tensors, bundle / "golden.safetensors")
        reseal(bundle)
        found = verify_bundle(bundle, speed=False)
        assert not found.passed and "ONNX Runtime, CPU, artifact at batch 1" in found.problems[0]
        del tensors["expected:artifact"]
        save_file(tensors, bundle / "golden.safetensors")
        reseal(bundle)
        with pytest.raises(InputError, match="no fp32 'expected:artifact' of 2 classes"):
            verify_bundle(bundle, speed=False)

    def test_the_gate_names_the_task(self, made, tmp_path, wrong_task):
        with pytest.raises(GateError, match="ONNX Runtime, artifact at batch 1: error"):
            export_tasks([made / name for name in TASKS], tmp_path / "b", speed=False)
        assert (tmp_path / "b.rejected").is_dir() and not (tmp_path / "b").exists()


def change_config(run, **changes):
    config = read_json(run / "config.json")
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    write_json(run / "config.json", seal(config))


REFUSED = {
    "LoRA": (
        lambda run: change_config(run, lora_layers={"blocks.0.mlp.fc1": {}}),
        "other trained low-rank adapters inside its backbone",
    ),
    "last blocks": (
        lambda run: change_config(run, changed=["blocks.1.mlp.fc1.weight"]),
        "other trained blocks of its backbone",
    ),
    "random weights": (
        lambda run: change_config(run, backbone={"trained": True}),
        "other has weights of its own for its backbone",
    ),
    "GDPL": (lambda run: change_config(run, format=GDPL_FORMAT), "other is a GDPL run"),
    "backbone": (
        lambda run: change_config(run, backbone={"name": "test_vit2"}),
        "grade and .*other cannot share .* backbones are test_vit_shallow and test_vit2",
    ),
    "weights": (
        lambda run: change_config(run, backbone={"fingerprint": "0" * 64}),
        "SHA-256 of their frozen weights is [0-9a-f]{64} and 0{64}",
    ),
    "size": (
        lambda run: change_config(run, preprocess={"input_size": [3, 48, 48]}),
        r"input_size is \[3, 32, 32\] and \[3, 48, 48\]",
    ),
    "intensity": (
        lambda run: change_config(run, preprocess={"intensity_range": [0.0, 4095.0]}),
        r"intensity_range is None and \(0\.0, 4095\.0\)",
    ),
    "views": (
        lambda run: change_config(run, adapt={"tta": "flips"}),
        "test-time augmentation is none and flips",
    ),
}


class TestRefused:
    @pytest.mark.parametrize("what", REFUSED)
    def test_runs_that_share_no_features(self, made, tmp_path, what):
        other = shutil.copytree(made / "artifact", tmp_path / "other")
        change, says = REFUSED[what]
        change(other)
        with pytest.raises(InputError, match=says) as caught:
            load_tasks({"a": made / "grade", "b": other})
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            (("grade",), "two tasks are called 'grade': name the tasks with --task NAME"),
            (("artifact", "--task", "a"), "--task names 1 task; there are 2 runs"),
            (("artifact", "--task", "a b", "--task", "c"), "a task cannot be called 'a b'"),
            (("artifact", "--with-features"), "--with-features is for one model"),
            (("artifact", "--classes", "x.txt"), "--classes is for one GDPL run"),
            (("--task", "a"), "--task names the tasks of several runs"),
        ],
    )
    def test_options(self, made, tmp_path, monkeypatch, capfd, more, says):
        monkeypatch.chdir(made)
        assert command(monkeypatch, "export", "grade", *more, "--out", tmp_path / "b") != 0
        shown = capfd.readouterr().err
        assert says in shown and shown.count("\n") == 1

    def test_a_lora_run_as_training_leaves_it(self, made, tmp_path):
        rows = [(str(path), "", "val") for path in images_of(made)]
        save_run(tmp_path / "lora", "grade", made / "weights.pth", rows, lora=LoRAConfig(r=2))
        with pytest.raises(InputError, match="low-rank adapters inside its backbone"):
            export_tasks([made / "artifact", tmp_path / "lora"], tmp_path / "b")


def test_images_of_several_runs_are_merged():
    def samples(*pairs, calibration=()):
        found = tuple(Sample(name, label) for name, label in pairs)
        return Samples(found, "a split", tuple(Sample(n, "x") for n in calibration), found)

    merged = merge_samples(
        {
            "a": samples(("1", "x"), ("2", "y"), calibration=("3", "4")),
            "b": samples(("2", "u"), ("5", None), calibration=("1", "6")),
        }
    )
    assert [sample.path for sample in merged.samples] == ["1", "2", "5"]
    assert merged.samples[1].tasks == {"a": "y", "b": "u"}
    assert merged.samples[1].label == "a: y, b: u" and merged.samples[2].label is None
    assert [sample.path for sample in merged.calibration] == ["3", "4", "6"]
