"""``fastadapt export`` and ``fastadapt verify`` on runs, as the command line shows them."""

import json
import shutil

import pytest

from fastadapt.files import read_json, seal
from tests.helpers.command import command

pytestmark = pytest.mark.usefixtures("no_speed")


def damage(run, what):
    config = read_json(run / "config.json")
    adapter = run / "adapter.safetensors"
    if what == "no config":
        (run / "config.json").unlink()
    elif what == "truncated":
        adapter.write_bytes(adapter.read_bytes()[:-100])
    elif what == "nan":
        from safetensors.torch import load_file, save_file

        state = load_file(adapter)
        state["head.weight"][0, 0] = float("nan")
        save_file(state, adapter)
    elif what == "other backbone":
        config["backbone"]["fingerprint"] = "0" * 64
    elif what == "unknown backbone":
        config["backbone"]["name"] = "test_vitt"
    elif what == "labels":
        config["labels"] = ["one"]
    elif what == "few images":
        (run / "splits.csv").write_text("path,label,split\n/a.png,crack,train\n")
    if what != "no config":
        (run / "config.json").write_text(json.dumps(seal(config)))


class TestCommand:
    def test_export_and_verify(self, run, tmp_path, monkeypatch, capfd, quick):
        assert command(monkeypatch, "export", run, "--onnx", "--out", tmp_path / "b") == 0
        shown = capfd.readouterr()
        assert shown.err == ""
        for word in ("✓ fold", "2 LoRALinear, 1 ClusterAttention", "end to end", "model.onnx"):
            assert word in shown.out
        assert command(monkeypatch, "verify", tmp_path / "b") == 0
        shown = capfd.readouterr()
        assert shown.err == ""
        assert "images/s" in shown.out

    def test_the_result_as_json(self, run, tmp_path, monkeypatch, capfd, quick):
        assert command(monkeypatch, "export", run, "--json", "--out", tmp_path / "b [v2]") == 0
        made = json.loads(capfd.readouterr().out)
        assert made["bundle"] == str(tmp_path / "b [v2]") and made["triton_model"] is None
        assert made["manifest"] == read_json(tmp_path / "b [v2]" / "manifest.json")

    def test_the_bundle_lies_in_the_run_by_default(self, run, monkeypatch, quick):
        assert command(monkeypatch, "export", run) == 0
        assert (run / "bundle" / "model.onnx").is_file()

    def test_rejection_is_exit_code_one(self, run, tmp_path, monkeypatch, capfd, broken):
        assert command(monkeypatch, "export", run, "--out", tmp_path / "b") == 1
        shown = capfd.readouterr()
        assert shown.err.startswith("fastadapt: the export was rejected: ONNX Runtime at batch 1")
        assert shown.err.count("\n") == 1
        assert "✗" in shown.out

    def test_verify_says_what_is_wrong(self, made, tmp_path, monkeypatch, capfd):
        shutil.copytree(made / "bundle", tmp_path / "b")
        (tmp_path / "b" / "labels.txt").write_text("good\ncrack\n")
        assert command(monkeypatch, "verify", tmp_path / "b") == 1
        assert "labels.txt was changed" in capfd.readouterr().err

    @pytest.mark.parametrize(
        "what,says",
        [
            ("no config", "run is no run; expected the folder of a training, with config.json"),
            ("truncated", "adapter.safetensors is no complete safetensors file"),
            ("nan", "head.weight holds 1 value that is NaN"),
            ("other backbone", "was trained on other weights of test_vit_shallow"),
            ("unknown backbone", "timm has no model 'test_vitt'. Nearest: test_vit"),
            ("labels", "names 1 label; the model has 2 classes"),
            ("few images", "has 0 images; the parity check needs at least 5"),
        ],
    )
    def test_bad_runs_are_one_clear_line(self, run, tmp_path, monkeypatch, capfd, what, says):
        damage(run, what)
        assert command(monkeypatch, "export", run, "--out", tmp_path / "b") == 1
        error = capfd.readouterr().err
        assert says in error
        assert error.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def test_missing_things(self, run, tmp_path, monkeypatch, capfd):
        assert command(monkeypatch, "export", tmp_path / "nothing") == 1
        assert "nothing is no folder" in capfd.readouterr().err
        assert command(monkeypatch, "export", run, "--images", tmp_path / "nothing") == 1
        assert "nothing is no folder" in capfd.readouterr().err
        assert command(monkeypatch, "export", run, "--weights", tmp_path / "gone.pth") == 1
        assert "gone.pth, which are not there" in capfd.readouterr().err
        assert command(monkeypatch, "export", run, "--golden", tmp_path / "nothing") == 1
        assert "nothing is no folder; --golden is to be one" in capfd.readouterr().err
        assert command(monkeypatch, "export", run, "--batch", "1:1:100000") == 1
        assert "--batch is '1:1:100000'; expected at most 4,096" in capfd.readouterr().err

    def test_what_lies_beside_a_run(self, made, tmp_path, monkeypatch, capfd):
        assert command(monkeypatch, "export", made / "bundle") == 1
        assert "bundle is a bundle; expected the folder of a training" in capfd.readouterr().err
        assert command(monkeypatch, "export", made, "--out", tmp_path / "b") == 1
        assert f"with config.json; did you mean {made / 'run'}?" in capfd.readouterr().err
        assert command(monkeypatch, "verify", made / "weights.pth") == 1
        assert "is no bundle: it is a file, not a folder." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "out", "says"),
    [
        ("test_resnet", "/", "/ cannot be a bundle: choose the name of a folder as --out"),
        (
            "test_resnet.foo",
            "b",
            "timm has no 'foo' of test_resnet. Nearest: test_resnet.r160_in1k",
        ),
    ],
)
def test_no_internal_error(tmp_path, monkeypatch, capfd, name, out, says):
    import timm
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), "w.pth")
    arguments = ("--backbone", name, "--checkpoint", "w.pth", "--out", out)
    assert command(monkeypatch, "export", *arguments) == 1
    error = capfd.readouterr().err
    assert says in error and error.count("\n") == 1 and "internal" not in error


def test_the_working_folder_as_bundle(tmp_path, monkeypatch):
    import timm
    import torch

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), "../w.pth")
    arguments = ("--backbone", "test_resnet", "--checkpoint", "../w.pth", "--out", ".")
    assert command(monkeypatch, "export", *arguments, "--no-speed") == 0
    assert (tmp_path / "empty" / "model.onnx").is_file()
