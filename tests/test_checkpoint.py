import copy
import json
import pickle
from argparse import Namespace

import pytest
import timm
import torch

import fastadapt as fa
from fastadapt.files import read_tensors, seal, write_tensors
from fastadapt.layers.lora import LoRASlice
from fastadapt.lora import lora_layers, wrap
from fastadapt.trainable import plain_name
from tests.helpers.upstream import UpstreamModel, UpstreamPost

SMALL = {"rank": 8, "num_centers": 3, "mlp_ratio": 0.5}


@pytest.fixture
def weights(tmp_path):
    """A file of backbone weights, as a user would have one."""
    file = tmp_path / "backbone.pth"
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), file)
    return str(file)


@pytest.fixture
def model(weights):
    return fa.adapt("test_vit", fa.AdaptConfig(**SMALL), 3, weights=weights).eval()


def images(model):
    return torch.randn(2, *model.spec.input_size)


def edit(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(seal(config | changes)))


class TestRoundTrip:
    def test_by_name_and_weights(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run")
        loaded = fa.load_adapter(tmp_path / "run")
        x = images(model)
        assert torch.equal(loaded(x), model(x))
        assert not loaded.training and loaded.frozen

    def test_only_what_was_added_is_written(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run")
        tensors, _ = read_tensors(tmp_path / "run" / "adapter.safetensors")
        assert all(name.startswith(("adapter.", "head.")) for name in tensors)

    def test_on_a_module(self, tmp_path):
        module = torch.nn.Conv2d(3, 5, 4, 4)
        model = fa.adapt(module, fa.AdaptConfig(**SMALL, input_size=(3, 8, 8)), 2).eval()
        fa.save_adapter(model, tmp_path / "run")
        with pytest.raises(fa.InputError, match="backbone="):
            fa.load_adapter(tmp_path / "run")
        x = images(model)
        assert torch.equal(fa.load_adapter(tmp_path / "run", module)(x), model(x))

    def test_with_lora(self, weights, tmp_path):
        config = fa.AdaptConfig(**SMALL, lora=fa.LoRAConfig(r=2, alpha=3, parts="qv"))
        model = fa.adapt("test_vit", config, 3, weights=weights).eval()
        with torch.no_grad():
            model.backbone.blocks[0].attn.qkv.lora_B["v"].normal_()
        fa.save_adapter(model, tmp_path / "run")
        x = images(model)
        assert torch.equal(fa.load_adapter(tmp_path / "run")(x), model(x))

    def test_with_a_trained_backbone(self, model, tmp_path, weights):
        model.unfreeze()
        with torch.no_grad():
            model.backbone.pos_embed.add_(1)
        fa.save_adapter(model.eval(), tmp_path / "run")
        # Every weight is in the file: the pretrained ones are no longer needed.
        (tmp_path / "backbone.pth").unlink()
        x = images(model)
        assert torch.equal(fa.load_adapter(tmp_path / "run")(x), model(x))

    def test_saving_again_does_not_lose_the_first(self, model, tmp_path, monkeypatch):
        fa.save_adapter(model, tmp_path / "run")
        before = (tmp_path / "run" / "adapter.safetensors").read_bytes()
        with torch.no_grad():
            model.head.weight.fill_(float("nan"))
        with pytest.raises(fa.InputError, match=r"head\.weight holds .* NaN"):
            fa.save_adapter(model, tmp_path / "run")
        assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == before
        assert not list((tmp_path / "run").glob("*.tmp"))


def reloads(model, folder, backbone=None):
    """Save, load onto fresh pretrained weights, and compare dtypes and outputs bit for bit."""
    fa.save_adapter(model, folder)
    loaded = fa.load_adapter(folder, backbone)
    plain = getattr(model, "_orig_mod", model)
    want = {plain_name(k): v.dtype for k, v in plain.state_dict().items()}
    assert {plain_name(k): v.dtype for k, v in loaded.state_dict().items()} == want
    x = images(loaded).to(next(plain.backbone.parameters()).dtype)
    assert torch.equal(loaded(x), plain.eval()(x))
    return loaded


def pretrained():
    torch.manual_seed(5)
    return timm.create_model("test_vit", num_classes=0).eval()


def trained_a_step(model):
    """Take one large step on everything that requires gradients."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(images(model)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


class TestWhatIsSavedCanBeLoaded:
    def test_compiled(self, model, tmp_path):
        compiled = torch.compile(model, backend="eager")
        compiled(images(model))
        reloads(compiled, tmp_path / "run")
        tensors, _ = read_tensors(tmp_path / "run" / "adapter.safetensors")
        assert all(name.startswith(("adapter.", "head.")) for name in tensors)

    def test_parts_that_are_compiled(self, tmp_path):
        backbone = torch.compile(pretrained(), backend="eager")
        config = fa.AdaptConfig(**SMALL, lora=fa.LoRAConfig(r=2))
        model = fa.adapt(backbone, config, 3)
        model.adapter = torch.compile(model.adapter, backend="eager")
        trained_a_step(model.unfreeze(last=1))
        reloads(model, tmp_path / "run", pretrained())
        reloads(model, tmp_path / "run", torch.compile(pretrained(), backend="eager"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("named", [True, False])
    def test_another_dtype(self, weights, tmp_path, dtype, named):
        backbone = "test_vit" if named else pretrained()
        model = fa.adapt(
            backbone, fa.AdaptConfig(**SMALL), 3, weights=weights if named else None
        ).to(dtype)
        reloads(model, tmp_path / "run", None if named else pretrained())

    def test_a_backbone_alone_in_half_precision(self, tmp_path):
        model = fa.adapt(pretrained().to(torch.bfloat16), fa.AdaptConfig(**SMALL), 3)
        model.backbone.norm.float()
        fa.save_adapter(model.eval(), tmp_path / "run")
        loaded = fa.load_adapter(tmp_path / "run", pretrained())
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
            assert loaded.state_dict()[name].dtype == tensor.dtype

    def test_weights_of_less_precision_are_named(self, tmp_path):
        fa.save_adapter(fa.adapt(pretrained(), fa.AdaptConfig(**SMALL), 3), tmp_path / "run")
        with pytest.raises(fa.InputError, match=r"these are bfloat16.* trained on float32"):
            fa.load_adapter(tmp_path / "run", pretrained().to(torch.bfloat16))

    def test_half_precision_as_older_versions_saved_it(self, tmp_path):
        model = fa.adapt(pretrained(), fa.AdaptConfig(**SMALL), 3).to(torch.bfloat16).eval()
        fa.save_adapter(model, tmp_path / "run")
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        del config["backbone"]["dtypes"], config["weights_sha256"], config["content_sha256"]
        config["version"] = 1
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        x = images(model).to(torch.bfloat16)
        assert torch.equal(fa.load_adapter(tmp_path / "run", pretrained())(x), model(x))

    @pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
    def test_last_blocks(self, tmp_path, name):
        def make():
            torch.manual_seed(5)
            return timm.create_model(name).eval()

        model = fa.adapt(make(), fa.AdaptConfig(**SMALL), 3)
        trained_a_step(model.unfreeze(last=1))
        reloads(model.freeze(), tmp_path / "run", make())
        tensors, _ = read_tensors(tmp_path / "run" / "adapter.safetensors")
        held = {n for n in tensors if n.startswith("backbone.")}
        prefixes = ("blocks.5.", "norm.") if name == "test_vit" else ("layer4.0.",)
        assert held and all(n.removeprefix("backbone.").startswith(prefixes) for n in held)
        assert any("running_mean" in n for n in held) == (name == "test_resnet")

    @pytest.mark.parametrize("lora", [None, fa.LoRAConfig(r=2)])
    def test_parameters_unfrozen_one_by_one(self, tmp_path, lora):
        model = fa.adapt(pretrained(), fa.AdaptConfig(**SMALL, lora=lora), 3)
        model.backbone.blocks[2].norm1.requires_grad_(True)
        trained_a_step(model)
        model.requires_grad_(False)
        loaded = reloads(model, tmp_path / "run", pretrained())
        assert not torch.equal(loaded.backbone.blocks[2].norm1.bias, torch.zeros(64))
        # And once more, from what was loaded.
        reloads(loaded, tmp_path / "again", pretrained())

    def test_a_backbone_with_a_loaded_lora(self, tmp_path):
        """A PEFT folder's replaced parameters are carried along, also by a copy."""
        layer_names = [f"blocks.{i}.attn.qkv" for i in range(6)]
        backbone = pretrained()
        for name in layer_names:
            wrap(backbone, name, [LoRASlice("all", 0, 192, 2, 1.0)])
        lora_layers(backbone)[layer_names[0]].replaced = frozenset({"norm.bias"})
        torch.nn.init.ones_(backbone.norm.bias)
        model = copy.deepcopy(fa.adapt(backbone, fa.AdaptConfig(**SMALL), 3))
        reloads(model, tmp_path / "run", pretrained())

    def test_other_models_are_refused(self, tmp_path):
        with pytest.raises(fa.InputError, match=r"is a Linear; expected what fa\.adapt"):
            fa.save_adapter(torch.nn.Linear(2, 2), tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestDamagedFolders:
    def test_weights_of_another_save(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "one")
        torch.nn.init.normal_(model.head.weight)
        fa.save_adapter(model, tmp_path / "two")
        (tmp_path / "two" / "adapter.safetensors").replace(tmp_path / "one" / "adapter.safetensors")
        with pytest.raises(fa.InputError, match="was not written with"):
            fa.load_adapter(tmp_path / "one")

    @pytest.mark.parametrize(
        ("keys", "value", "says"),
        [
            (("num_classes",), 10**9, "head.weight has shape"),
            (("num_classes",), "3", "num_classes is '3'"),
            (("num_classes",), True, "num_classes is True"),
            (("changed",), "norm.bias", "no list of names"),
            (("lora_layers",), [], "no JSON object"),
            (("adapt", "depth"), 900, r"lacks 'adapter\.blocks\.899"),
            (("adapt", "rank"), 60_000, "transforms has shape"),
            (("adapt", "num_centers"), 60_000, "transforms has shape"),
            (("adapt", "mlp_ratio"), 900.0, "fc1.weight has shape"),
            (("adapt", "input_size"), [3, 60_000, 60_000], "input_size"),
            (("backbone",), None, "backbone is None"),
            (("backbone", "name"), 7, "name is 7"),
            (("backbone", "kind"), "url", "kind is 'url'"),
            (("backbone", "dtypes"), {"": "int8"}, "dtypes is"),
            (("version",), "1", "version '1'"),
            (("lora_layers", "blocks.0.attn.qkv", "slices", 0, "r"), 2**30, "lora_A.q has shape"),
            (("lora_layers", "blocks.0.attn.qkv", "slices", 0, "r"), -1, "r is -1"),
            (("lora_layers", "blocks.0.attn.qkv", "slices", 0, "stop"), 2**40, "stop is"),
            (("lora_layers", "blocks.0.attn.qkv", "slices", 0, "stop"), 0, "stop is 0"),
            (("lora_layers", "blocks.0.attn.qkv", "slices"), [], "at least one slice"),
            (("lora_layers", "blocks.0.attn.qkv", "dropout"), 1.5, "dropout is 1.5"),
            (("lora_layers", "blocks.0.attn.qkv", "slices", 0, "scaling"), None, "scaling is None"),
        ],
    )
    def test_every_value_is_typed_and_bounded(self, weights, tmp_path, keys, value, says):
        config = fa.AdaptConfig(**SMALL, lora=fa.LoRAConfig(r=2, parts="qv"))
        model = fa.adapt("test_vit", config, 3, weights=weights)
        fa.save_adapter(model, tmp_path / "run")
        file = tmp_path / "run" / "config.json"
        whole = json.loads(file.read_text())
        place = whole
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        file.write_text(json.dumps(seal(whole)))
        with pytest.raises(fa.InputError, match=says):
            fa.load_adapter(tmp_path / "run")


class TestRefusals:
    def test_a_configuration_that_was_changed(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run", labels=["a", "b", "c"])
        file = tmp_path / "run" / "config.json"
        whole = json.loads(file.read_text())
        without = {key: value for key, value in whole.items() if key != "content_sha256"}
        for changed in ({**whole, "labels": ["a", "c", "b"]}, without):
            file.write_text(json.dumps(changed))
            with pytest.raises(fa.InputError, match="was changed: its content is not what"):
                fa.load_adapter(tmp_path / "run")
        file.write_text(json.dumps({**without, "version": 1}))  # as older versions wrote it
        assert fa.load_adapter(tmp_path / "run")

    def test_other_weights_of_the_same_model(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run")
        other = tmp_path / "other.pth"
        torch.save(timm.create_model("test_vit").state_dict(), other)
        with pytest.raises(fa.InputError, match="other weights"):
            fa.load_adapter(tmp_path / "run", weights=str(other))

    def test_weights_that_are_gone(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run")
        (tmp_path / "backbone.pth").unlink()
        with pytest.raises(fa.InputError, match=r"backbone\.pth, which are not there.*`weights="):
            fa.load_adapter(tmp_path / "run")

    def test_another_backbone(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run")
        with pytest.raises(fa.InputError, match="other weights"):
            fa.load_adapter(tmp_path / "run", timm.create_model("test_vit3", num_classes=0))

    def test_nan(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run")
        file = tmp_path / "run" / "adapter.safetensors"
        tensors, _ = read_tensors(file)
        tensors["adapter.norm1.weight"][3] = float("nan")
        write_tensors(file, tensors)
        with pytest.raises(fa.InputError, match=r"adapter\.norm1\.weight holds 1 value that is"):
            fa.load_adapter(tmp_path / "run")

    def test_truncated_file(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run")
        file = tmp_path / "run" / "adapter.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(fa.InputError, match="truncated"):
            fa.load_adapter(tmp_path / "run")

    def test_missing_and_wrong_tensors_are_named_with_shapes(self, model, tmp_path):
        fa.save_adapter(model, tmp_path / "run")
        file = tmp_path / "run" / "adapter.safetensors"
        tensors, _ = read_tensors(file)
        write_tensors(file, {k: t for k, t in tensors.items() if k != "head.bias"})
        with pytest.raises(fa.InputError, match=r"lacks 1 tensor, 'head\.bias'"):
            fa.load_adapter(tmp_path / "run")
        write_tensors(file, tensors | {"head.bias": torch.zeros(4)})
        with pytest.raises(fa.InputError, match=r"head\.bias has shape \(4,\).*expects \(3,\)"):
            fa.load_adapter(tmp_path / "run")

    @pytest.mark.parametrize(
        ("change", "says"),
        [({"version": 99}, "newer fastadapt"), ({"format": "x"}, "no fastadapt adapter")],
    )
    def test_other_formats(self, model, tmp_path, change, says):
        fa.save_adapter(model, tmp_path / "run")
        edit(tmp_path / "run", **change)
        with pytest.raises(fa.InputError, match=says):
            fa.load_adapter(tmp_path / "run")

    def test_a_pickle_with_code_in_it_does_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

        file = tmp_path / "weights.pth"
        file.write_bytes(pickle.dumps({"state_dict": Evil()}))
        with pytest.raises(fa.InputError, match="could run code"):
            fa.adapt("test_vit", None, 2, weights=str(file))
        torch.save({"state_dict": Evil()}, file)
        with pytest.raises(fa.InputError, match="could run code"):
            fa.adapt("test_vit", None, 2, weights=str(file))
        assert not (tmp_path / "ran").exists()


class TestUpstream:
    @pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_a_whole_checkpoint_gives_upstreams_outputs(self, name, prefix, tmp_path):
        backbone = timm.create_model(name, num_classes=0).eval()
        ours = fa.adapt(timm.create_model(name, num_classes=0), fa.AdaptConfig(**SMALL, depth=2), 3)
        dim, skip = ours.spec.dim, ours.spec.num_prefix_tokens
        sizes = {"depth": 2, "centers": 3, "rank": 8, "mlp_ratio": 0.5}
        upstream = UpstreamModel(backbone, dim, 3, skip, **sizes).eval()
        torch.save(
            {f"{prefix}{k}": v for k, v in upstream.state_dict().items()}, tmp_path / "u.pth"
        )
        state = torch.load(tmp_path / "u.pth", weights_only=True)
        ours.load_state_dict(fa.convert_cladapter_state_dict(state))
        x = images(ours)
        torch.testing.assert_close(ours.eval()(x), upstream(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
    def test_a_file_of_upstreams_trainer(self, name, tmp_path):
        """With optimizer, arguments and timm's classifier, which upstream keeps and never calls."""
        backbone = timm.create_model(name).eval()
        ours = fa.adapt(timm.create_model(name, num_classes=0), fa.AdaptConfig(**SMALL), 3)
        dim, skip = ours.spec.dim, ours.spec.num_prefix_tokens
        sizes = {"depth": 1, "centers": 3, "rank": 8, "mlp_ratio": 0.5}
        upstream = UpstreamModel(backbone, dim, 3, skip, **sizes).eval()
        state = {f"module.{k}": v for k, v in upstream.state_dict().items()}
        optimizer = torch.optim.AdamW(upstream.parameters()).state_dict()
        content = {"state_dict": state, "optimizer": optimizer, "args": Namespace(lr=0.1)}
        torch.save({**content, "epoch": 3, "max_accuracy": 0.5}, tmp_path / "best.pth")
        ours.load_state_dict(fa.convert_cladapter_state_dict(tmp_path / "best.pth"))
        x = images(ours)
        torch.testing.assert_close(ours.eval()(x), upstream(x), rtol=1e-5, atol=1e-5)
        assert not any("backbone.head.fc" in k for k in fa.convert_cladapter_state_dict(content))

    @pytest.mark.parametrize("prefix", ["post.", "module.post.", "", "module."])
    def test_the_adapter_alone_under_any_prefix(self, prefix):
        post = UpstreamPost(8, depth=2, centers=3, rank=4)
        state = {f"{prefix}{k}": v for k, v in post.state_dict().items()}
        ours = fa.CLAdapter(8, depth=2, num_centers=3, rank=4)
        ours.load_state_dict(fa.convert_cladapter_state_dict(state, part="adapter"))
        x = torch.randn(2, 5, 8)
        torch.testing.assert_close(ours(x), post(x), rtol=1e-5, atol=1e-5)

    def test_parts(self):
        upstream = UpstreamModel(torch.nn.Conv2d(3, 8, 4), 8, 3, 0, centers=3, rank=4)
        state = upstream.state_dict()
        convert = fa.convert_cladapter_state_dict
        assert set(convert(state, part="head")) == {"weight", "bias"}
        assert set(convert(state, part="backbone")) == {"weight", "bias"}
        assert not any("proj." in key for key in convert(state))

    def test_a_mismatch_names_the_key_and_both_shapes(self):
        state = UpstreamPost(8, centers=3, rank=4).state_dict()
        converted = fa.convert_cladapter_state_dict(state, part="adapter")
        with pytest.raises(RuntimeError, match=r"attn\.transforms.*\[3, 4, 4\].*\[3, 5, 5\]"):
            fa.CLAdapter(8, num_centers=3, rank=5).load_state_dict(converted)

    def test_unknown_keys_are_named(self):
        with pytest.raises(fa.InputError, match=r"'post\.norm3\.weight'"):
            fa.convert_cladapter_state_dict({"post.norm3.weight": torch.zeros(2)})
        with pytest.raises(fa.InputError, match="no adapter"):
            fa.convert_cladapter_state_dict({"head.weight": torch.zeros(2)}, part="adapter")
        with pytest.raises(fa.InputError, match="'tail'"):
            fa.convert_cladapter_state_dict({}, part="tail")

    def test_token_mode_with_its_projection_is_refused(self):
        state = UpstreamPost(8, centers=3, rank=4).state_dict()
        state = {k: v for k, v in state.items() if "down_layer" not in k and "up_layer" not in k}
        with pytest.raises(fa.InputError, match="token mode"):
            fa.convert_cladapter_state_dict(state)
