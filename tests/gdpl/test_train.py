import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastadapt as fa
from fastadapt.data.dataset import Sample
from fastadapt.files import read_tensors, seal
from fastadapt.gdpl import (
    GDPLConfig,
    GDPLModel,
    GDPLSource,
    GDPLTrainConfig,
    create_clip,
    load_gdpl,
    save_gdpl,
    train_gdpl,
)
from fastadapt.gdpl.evaluate import accuracies, result_markdown, result_table
from fastadapt.gdpl.few_shot import harmonic_mean, of_classes, sample_shots, split_classes
from tests.gdpl.test_model import SMALL, WIDTH, randomize, small_model
from tests.helpers.gdpl_models import WordTokenizer, clip_model, make_colours, save_source

NAMES = ("annual_crop", "forest", "harbour", "industrial_area", "river")
GDPL = GDPLConfig(depth=2, rank=2, rank_depth=2)
QUICK = GDPLTrainConfig(
    shots=2, epochs=3, lr=5e-3, optimizer="adamw", augment="none", val_fraction=0.4
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("gdpl") / "clip")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("data") / "colours", NAMES)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("data") / "other", ("desert", "sea"), count=3)


class TestFewShot:
    samples = tuple(Sample(f"{i:02}", i % 3, "train") for i in range(20))

    def test_shots_are_per_class_and_follow_the_seed(self):
        chosen = sample_shots(self.samples, 4, seed=1)
        assert [sum(s.label == label for s in chosen) for label in range(3)] == [4, 4, 4]
        assert chosen == sample_shots(self.samples, 4, seed=1)
        assert chosen != sample_shots(self.samples, 4, seed=2)
        assert len(set(chosen)) == 12

    def test_fewer_images_than_shots_and_all(self):
        assert len(sample_shots(self.samples, 7, seed=1)) == 20
        assert sample_shots(self.samples, 0, seed=1) == list(self.samples)
        with pytest.raises(fa.InputError, match="shots is -1"):
            sample_shots(self.samples, -1, seed=1)

    def test_halves(self):
        assert [list(part) for part in split_classes(5)] == [[0, 1, 2], [3, 4]]
        with pytest.raises(fa.InputError, match="has 3 classes"):
            split_classes(3)
        novel = of_classes(self.samples, range(1, 3))
        assert {s.label for s in novel} == {0, 1} and len(novel) == 13

    def test_harmonic_mean(self):
        assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
        assert harmonic_mean(0.0, 0.0) == 0
        found = accuracies({n: {"accuracy": a} for n, a in (("base", 0.5), ("novel", 1.0))})
        assert list(found) == ["base", "novel", "harmonic mean"]


class TestTraining:
    def test_base_to_novel_and_another_data_set(self, source, data, other_data, tmp_path):
        names = tmp_path / "names.json"
        names.write_text(json.dumps({"annual_crop": "farm land", "sea": "open sea"}))
        out = tmp_path / "run"
        results = train_gdpl(
            data, out, source, QUICK, GDPL, eval_data=[other_data], names_file=names, profile=True
        )
        seconds = json.loads((out / "profile.json").read_text())
        assert seconds["stage1"] > 0 and seconds["validation"] > 0 and seconds["decode"] > 0
        assert results["classes"]["base"] == ["farm land", "forest", "harbour"]
        assert results["classes"]["novel"] == ["industrial_area", "river"]
        assert results["classes"]["other"] == ["desert", "open sea"]
        run = results["seeds"]["1"]
        assert run["train_images"] == 6
        assert run["last_loss"] < run["first_loss"]
        assert results["images"] == {"base": 6, "novel": 4, "other": 6}
        assert set(run["metrics"]) == set(results["zero_shot"]) == {"base", "novel", "other"}
        assert json.loads((out / "results.json").read_text())["metrics"] == run["metrics"]
        assert (out / "labels.txt").read_text().splitlines()[0] == "farm land"
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
        splits = list(csv.DictReader((out / "splits.csv").open()))
        assert len(splits) == 30

        model = load_gdpl(out)
        assert model.class_names == ("farm land", "forest", "harbour")
        assert "harmonic mean" in result_markdown(results)
        assert len(result_table(results).rows) == 2

    def test_seeds_are_averaged_and_resumed(self, source, data, tmp_path):
        out = tmp_path / "run"
        config = replace(QUICK, epochs=1, train_classes="all")
        results = train_gdpl(data, out, source, config, GDPL, seeds=(1, 2))
        assert list(results["seeds"]) == ["1", "2"]
        assert set(results["seeds"]["1"]["metrics"]) == {"all"}
        table = result_markdown(results)
        assert "mean of 2" in table and "±" in table
        first = (out / "seed1" / "adapter.safetensors").stat().st_mtime_ns
        (out / "seed2" / "results.json").unlink()
        again = train_gdpl(data, out, source, config, GDPL, seeds=(1, 2), resume=True)
        assert (out / "seed1" / "adapter.safetensors").stat().st_mtime_ns == first
        assert again["seeds"]["2"]["metrics"] == results["seeds"]["2"]["metrics"]
        with pytest.raises(fa.InputError, match="lr is"):
            train_gdpl(data, out, source, replace(config, lr=1.0), GDPL, seeds=(1, 2), resume=True)

    @pytest.mark.parametrize("augment", ["none", "crops"])
    def test_every_image_s_domain_features_are_computed_once(
        self, source, data, tmp_path, monkeypatch, augment
    ):
        seen = []
        real = GDPLModel.domain_features

        def domain_features(self, images):
            seen.append(len(images))
            return real(self, images)

        monkeypatch.setattr(GDPLModel, "domain_features", domain_features)
        config = replace(QUICK, augment=augment)
        train_gdpl(data, tmp_path / "run", source, config, GDPL, seeds=(1, 2))
        # Random views of training images are new in every epoch.
        training = 6 if augment == "none" else 6 * QUICK.epochs
        assert sum(seen) == 2 * training + 10

    def test_runs_are_not_overwritten_unasked(self, source, data, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(fa.InputError, match="holds a run already"):
            train_gdpl(data, tmp_path, source, QUICK, GDPL)

    @pytest.mark.parametrize("augment", ["crops", "none"])
    def test_equal_seeds_give_equal_weights(self, source, data, tmp_path, augment):
        config = replace(QUICK, epochs=1, augment=augment)
        for name in "ab":
            train_gdpl(data, tmp_path / name, source, config, GDPL, seeds=(3,))
        a, b = (load_gdpl(tmp_path / name) for name in "ab")
        for name, p in a.named_parameters():
            assert torch.equal(p, b.get_parameter(name)), name

    def test_grad_checkpointing_gives_the_same_weights(self, source, data, tmp_path):
        for name, less in (("kept", False), ("again", True)):
            config = replace(QUICK, grad_checkpointing=less)
            train_gdpl(data, tmp_path / name, source, config, GDPL)
        a, b = (load_gdpl(tmp_path / name) for name in ("kept", "again"))
        for name, p in a.named_parameters():
            assert torch.equal(p, b.get_parameter(name)), name
        one, other = (
            json.loads((tmp_path / name / "results.json").read_text()) for name in ("kept", "again")
        )
        assert one == other  # so that a run may be resumed with the other setting

    def test_divergence_is_told(self, source, data, tmp_path):
        config = replace(QUICK, lr=1e6, optimizer="sgd", warmup_epochs=0)
        with pytest.raises(fa.InputError, match="lower `lr`"):
            train_gdpl(data, tmp_path / "run", source, config, GDPL)
        assert not (tmp_path / "run" / "config.json").exists()

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"shots": -1}, "shots is -1"),
            ({"epochs": 0}, "epochs is 0"),
            ({"lr": float("nan")}, "lr is nan"),
            ({"optimizer": "adam"}, "optimizer is 'adam'"),
            ({"train_classes": "novel"}, "train_classes is 'novel'"),
        ],
    )
    def test_settings(self, options, says):
        with pytest.raises(fa.InputError, match=says):
            GDPLTrainConfig(**options)

    def test_names_and_seeds_that_cannot_be(self, source, data, tmp_path):
        names = tmp_path / "names.json"
        names.write_text(json.dumps({"forest": "river"}))
        config = replace(QUICK, train_classes="all")
        with pytest.raises(fa.InputError, match="'river' and 'river' are the same text"):
            train_gdpl(data, tmp_path / "run", source, config, GDPL, names_file=names)
        names.write_text(json.dumps({"forrest": "wood"}))
        with pytest.raises(fa.InputError, match=r"'forrest', which no data set has.*forest"):
            train_gdpl(data, tmp_path / "run", source, config, GDPL, names_file=names)
        with pytest.raises(fa.InputError, match="different numbers"):
            train_gdpl(data, tmp_path / "run", source, QUICK, GDPL, seeds=(1, 1))


class TestCheckpoint:
    def test_what_was_saved_comes_back(self, tmp_path):
        clip, tokenizer = clip_model(), WordTokenizer()
        model = randomize(small_model(clip=clip)).eval()
        model.tokenizer = tokenizer
        model.set_class_names(["forest", "river"])
        save_gdpl(model, tmp_path)
        loaded = load_gdpl(tmp_path, clip, tokenizer=tokenizer)
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
        assert torch.equal(loaded(x, f), model(x, f))
        names = ["river", "harbour", "forest"]
        other = load_gdpl(tmp_path, clip, tokenizer=tokenizer, class_names=names)
        torch.testing.assert_close(other(x, f)[:, [2, 0]], model(x, f))
        # The frozen parts are not in the file.
        kept, _ = read_tensors(tmp_path / "adapter.safetensors")
        assert kept.keys() == {n for n, p in model.named_parameters() if p.requires_grad}

    def test_weights_that_moved(self, tmp_path):
        source = save_source(tmp_path / "clip")
        model = source.create(["forest", "river"], GDPL).eval()
        save_gdpl(model, tmp_path / "run", source)
        moved = Path(source.domain_weights).rename(tmp_path / "moved.safetensors")
        with pytest.raises(fa.InputError, match="does not exist"):
            load_gdpl(tmp_path / "run")
        loaded = load_gdpl(tmp_path / "run", domain_weights=str(moved))
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(loaded(x), model(x))

    def test_other_clip_weights_are_refused(self, tmp_path):
        save_gdpl(small_model(), tmp_path)
        with pytest.raises(fa.InputError, match="other weights of the clip"):
            load_gdpl(tmp_path, clip_model(), tokenizer=WordTokenizer())
        with pytest.raises(fa.InputError, match="cannot build by name"):
            load_gdpl(tmp_path)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"format": "fastadapt-adapter"}, "no GDPL model's"),
            ({"version": 9}, "newer fastadapt"),
            ({"gdpl": {**SMALL.to_dict(), "n_ctx": 1}}, "ctx has shape"),
            ({"gdpl": {**SMALL.to_dict(), "depth": 1}}, "prompt_learner"),
            ({"gdpl": {**SMALL.to_dict(), "rank": 0}}, "is unexpected"),
        ],
    )
    def test_damaged_or_foreign_folders(self, tmp_path, change, says):
        clip = clip_model()
        save_gdpl(small_model(clip=clip), tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(seal(json.loads(file.read_text()) | change)))
        with pytest.raises(fa.InputError, match=says):
            load_gdpl(tmp_path, clip, tokenizer=WordTokenizer())

    @pytest.mark.parametrize(
        ("name", "weights", "says"),
        [
            ("ViT-B-61", None, r"no model 'ViT-B-61'. Nearest: ViT-B-16"),
            ("ViT-B-16", None, "needs weights: .*laion2b"),
            ("ViT-B-16", "nowhere.pt", "neither a file nor weights"),
            ("local-dir:nowhere", None, "cannot be loaded"),
            ("local-dir:nowhere", "openai", "brings its own"),
        ],
    )
    def test_clip_models_that_cannot_be_had(self, name, weights, says):
        pytest.importorskip("open_clip")
        with pytest.raises(fa.InputError, match=says):
            create_clip(name, weights)

    def test_a_folder_without_weights(self, source, tmp_path):
        config = Path(source.clip.removeprefix("local-dir:")) / "open_clip_config.json"
        shutil.copy(config, tmp_path)
        with pytest.raises(fa.InputError, match="cannot be loaded"):
            GDPLSource(f"local-dir:{tmp_path}", None, "test_vit").create(["a", "b"])
