"""Models without a run: fine-tuned timm models and LoRA folders that PEFT wrote."""

import numpy as np
import peft
import pytest
import timm
import torch

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_timm, load
from fastadapt.export.bundle.engine_options import EngineOptions
from fastadapt.export.bundle.trained import load_timm
from fastadapt.files import read_json, read_tensors, sha256_file, write_tensors
from tests.helpers.command import command
from tests.helpers.imagesets import make_folders
from tests.helpers.shallow_models import SHALLOW_VIT

NAME, SIZE = SHALLOW_VIT, 32


def timm_model(classes):
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=classes, img_size=SIZE).eval()
    if classes:
        torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the base model with ten classes, of a fine-tuned one with three, and a LoRA."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(timm_model(10).state_dict(), folder / "base.pth")
    torch.save(timm_model(0).state_dict(), folder / "headless.pth")
    state = {f"module.{name}": tensor for name, tensor in timm_model(3).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "tuned.pth")
    base = timm_model(10)
    base.reset_classifier(3)
    settings = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(base, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder / "peft")
    return folder, wrapped.eval()


@pytest.fixture
def images(tmp_path):
    return make_folders(tmp_path / "images", per_class=3)


PRE = Preprocess((3, SIZE, SIZE))
X = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class TestLoad:
    def test_a_checkpoint_with_its_classifier(self, weights):
        file = weights[0] / "tuned.pth"
        trained = load_timm(NAME, checkpoint=file, image_size=SIZE, class_names=list("abc"))
        torch.testing.assert_close(trained.model(X), timm_model(3)(X))
        assert (trained.labels, trained.backbone) == (list("abc"), NAME)
        assert trained.preprocess.input_size == (3, SIZE, SIZE)
        assert trained.source["checkpoint"]["sha256"] == sha256_file(file)
        assert trained.pretrained_cfg["architecture"] == NAME

    def test_a_checkpoint_without_one_gives_features(self, weights, tmp_path):
        state = timm_model(0).state_dict()
        write_tensors(tmp_path / "f.safetensors", state)
        trained = load_timm(NAME, checkpoint=tmp_path / "f.safetensors", image_size=SIZE)
        assert trained.labels == []
        assert trained.model(X).shape == (3, 64)

    def test_a_peft_folder_with_its_classifier(self, weights):
        folder, wrapped = weights
        trained = load_timm(
            NAME, peft=folder / "peft", weights=folder / "base.pth", image_size=SIZE
        )
        with torch.no_grad():
            torch.testing.assert_close(trained.model(X), wrapped(X))
        assert trained.labels == ["0", "1", "2"]
        assert set(trained.source["peft"]["sha256"]) == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }

    def test_a_peft_folder_on_weights_without_a_classifier(self, weights, tmp_path):
        folder, wrapped = weights
        state = {k: v for k, v in timm_model(10).state_dict().items() if not k.startswith("head.")}
        write_tensors(tmp_path / "f.safetensors", state)
        options = {"peft": folder / "peft", "weights": tmp_path / "f.safetensors"}
        trained = load_timm(NAME, image_size=SIZE, **options)
        with torch.no_grad():
            torch.testing.assert_close(trained.model(X), wrapped(X))

    def test_half_a_classifier_is_refused(self, weights, tmp_path):
        folder = tmp_path / "peft"
        folder.mkdir()
        config = (weights[0] / "peft" / "adapter_config.json").read_text()
        (folder / "adapter_config.json").write_text(config)
        state, _ = read_tensors(weights[0] / "peft" / "adapter_model.safetensors")
        state = {name: tensor for name, tensor in state.items() if not name.endswith("head.bias")}
        write_tensors(folder / "adapter_model.safetensors", state)
        for name in ("base.pth", "headless.pth"):
            with pytest.raises(fa.InputError, match=r"'head' .* has no weights for its bias"):
                load_timm(NAME, peft=folder, weights=weights[0] / name, image_size=SIZE)

    @pytest.mark.parametrize(
        "options,says",
        [
            ({"checkpoint": "tuned.pth", "peft": "peft"}, "leave out `peft`"),
            ({"checkpoint": "gone.pth"}, r"gone\.pth does not exist"),
            ({"checkpoint": "tuned.pth", "class_names": ["a"]}, "`class_names` names 1 label;"),
            ({"checkpoint": "tuned.pth", "image_size": 64}, r"pos_embed has shape"),
            ({"checkpoint": "pickle.pth"}, "cannot be read as weights alone"),
            ({"peft": "nothing", "weights": "base.pth"}, r"adapter_config\.json does not exist"),
        ],
    )
    def test_what_does_not_fit(self, weights, options, says, brief_search):
        folder = weights[0]
        torch.save({"model": timm_model(3)}, folder / "pickle.pth")
        paths = ("checkpoint", "peft", "weights")
        options = {k: folder / v if k in paths else v for k, v in options.items()}
        with pytest.raises(fa.InputError, match=says):
            load_timm(NAME, **{"image_size": SIZE, **options})

    def test_an_unknown_name(self, weights):
        with pytest.raises(fa.InputError, match="timm has no model 'test_vitt'"):
            load_timm("test_vitt", checkpoint=weights[0] / "tuned.pth")


class TestWrongWeights:
    """A file of another model, or with a head that is not where timm has it."""

    def test_a_deeper_model(self, tmp_path):
        torch.save(timm.create_model("resnet34", num_classes=3).state_dict(), tmp_path / "f.pth")
        with pytest.raises(fa.InputError, match=r"layer1\.2\.conv1\.weight.*timm's resnet34"):
            load_timm("resnet18", checkpoint=tmp_path / "f.pth")

    def test_a_head_under_another_name(self, tmp_path):
        tuned = timm.create_model("resnet18", num_classes=3)
        tuned.fc = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(512, 3))
        torch.save(tuned.state_dict(), tmp_path / "f.pth")
        with pytest.raises(fa.InputError, match=r"fc\.1\.weight, fc\.1\.bias look like a class"):
            load_timm("resnet18", checkpoint=tmp_path / "f.pth")
        headless = load_timm("resnet18", checkpoint=tmp_path / "f.pth", features=True)
        assert headless.labels == [] and headless.model.num_classes == 0

    def test_a_deprecated_name(self, tmp_path):
        tuned = timm.create_model("vit_tiny_patch16_224", num_classes=3)
        torch.save(tuned.state_dict(), tmp_path / "f.pth")
        found = load_timm("vit_tiny_patch16_224_in21k", checkpoint=tmp_path / "f.pth")
        assert found.labels == ["0", "1", "2"]
        assert torch.equal(found.model.head.weight, tuned.head.weight)

    def test_a_vit_trained_on_averaged_tokens(self, tmp_path):
        torch.manual_seed(0)
        tuned = timm.create_model(NAME, num_classes=3, img_size=SIZE, global_pool="avg").eval()
        torch.save(tuned.state_dict(), tmp_path / "f.pth")
        found = load_timm(NAME, checkpoint=tmp_path / "f.pth", image_size=SIZE)
        with torch.no_grad():
            torch.testing.assert_close(found.model(X), tuned(X))

    def test_an_ema_beside_raw_weights(self, tmp_path):
        raw, ema = timm_model(3), timm_model(3)
        torch.nn.init.zeros_(ema.head.bias)
        torch.nn.init.ones_(raw.head.bias)
        state = {"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict()}
        torch.save(state, tmp_path / "f.pth")
        lines = []
        found = load_timm(NAME, checkpoint=tmp_path / "f.pth", image_size=SIZE, tell=lines.append)
        assert not found.model.head.bias.any()
        assert "'state_dict_ema' was taken, not state_dict" in lines[0]
        assert found.source["checkpoint"]["key"] == "state_dict_ema"
        options = {"checkpoint": tmp_path / "f.pth", "checkpoint_key": "state_dict"}
        assert load_timm(NAME, image_size=SIZE, **options).model.head.bias.all()


class TestExport:
    def test_peft_on_images(self, weights, images, tmp_path, monkeypatch, capfd):
        folder, wrapped = weights
        names = tmp_path / "names.txt"
        names.write_text("crossed\nlying\nupright\n")
        options = ["--peft", folder / "peft", "--weights", folder / "base.pth"]
        options += ["--image-size", SIZE, "--images", images, "--classes", names, "--no-speed"]
        options += ["--triton-repo", tmp_path / "models"]
        bundle = tmp_path / "b"
        code = command(monkeypatch, "export", "--backbone", NAME, *options, "--out", bundle)
        assert code == 0, capfd.readouterr().err
        manifest = read_json(bundle / "manifest.json")
        kinds = {row["kind"] for row in manifest["fold_report"]["layers"]}
        assert kinds == {"LoRALinear"}
        assert manifest["golden"]["origin"] == f"the folder {images}"
        assert (tmp_path / "models" / "b" / "config.pbtxt").is_file()
        picture = images / "lying" / "00.png"
        pre = Preprocess.from_dict({k: manifest["preprocessing"][k] for k in vars(PRE)})
        with torch.no_grad():
            want = wrapped(pre.normalize(pre.read(picture)[None])).numpy()
        np.testing.assert_allclose(load(bundle)(picture).logits, want, rtol=1e-3, atol=1e-3)
        again = command(monkeypatch, "export", "--backbone", NAME, *options, "--out", bundle)
        assert again == 1
        assert f"{bundle} exists: replace it with --overwrite" in capfd.readouterr().err

    def test_synthetic_images_are_said(self, weights, tmp_path, monkeypatch):
        result = export_timm(
            NAME,
            tmp_path / "b",
            checkpoint=weights[0] / "tuned.pth",
            image_size=SIZE,
            speed=False,
        )
        assert result.manifest["golden"]["origin"].startswith("synthetic")
        assert "From synthetic" in (tmp_path / "b" / "report.html").read_text()
        monkeypatch.setattr("fastadapt.export.precision.fp8.check_gpu", lambda: None)
        for engines in (
            EngineOptions(int8=True),
            EngineOptions(fp8=True, aoti=True, precision="bf16"),
        ):
            with pytest.raises(fa.InputError, match=r"`(int|fp)8` .* with `images=\.\.\.`"):
                export_timm(
                    NAME,
                    tmp_path / "c",
                    checkpoint=weights[0] / "tuned.pth",
                    image_size=SIZE,
                    speed=False,
                    engines=engines,
                )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]

    @pytest.mark.parametrize(
        "args,says",
        [
            ((), "a run's folder, or a model with --backbone"),
            (("--backbone", NAME), "--backbone needs --out"),
            (("run", "--backbone", NAME), "one of the two"),
            (("run", "--peft", "x"), "--peft is for models that --backbone names"),
            (("run", "--features"), "--features is for models that --backbone names"),
            (("--backbone", NAME, "--out", "b", "--domain-input"), "are for runs"),
            (("run", "--input", "float", "--resize"), "give --input uint8"),
            (("run", "--no-normalize"), "give --input float"),
            (("run", "--resize", "--precision", "fp16"), "--resize is for the fp32 ONNX file"),
            (("run", "--batch", "8:1:2"), "--batch is '8:1:2'"),
            (("run", "--aoti", "--fp8"), "add --aoti --precision bf16"),
            (("run", "--workspace", "9"), "--workspace is for TensorRT engines: add --trt"),
        ],
    )
    def test_options_that_do_not_fit(self, args, says, monkeypatch, capfd, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert command(monkeypatch, "export", *args) == 1
        error = capfd.readouterr().err
        assert says in error and error.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
