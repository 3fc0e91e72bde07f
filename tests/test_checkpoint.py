import json
import pickle

import pytest
import timm
import torch

import fastadapt as fa
from fastadapt.files import read_tensors, write_tensors
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
    file.write_text(json.dumps(config | changes))


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


class TestRefusals:
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
        with pytest.raises(fa.InputError, match=r"adapter\.norm1\.weight holds 1 values"):
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
        with pytest.raises(fa.InputError, match=r"lacks 1 tensors, 'head\.bias'"):
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
