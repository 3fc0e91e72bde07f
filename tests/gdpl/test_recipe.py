"""``--recipe paper`` of GDPL beside upstream's code, restated here from that code and dassl's.

``BASE_TO_NOVEL`` is vit_b16_c2_ep5_batch4_2ctx.yaml and ``CROSS_DATA_SET`` its
``…_cross_datasets.yaml``, with the defaults of dassl's ``config/defaults.py``.
"""

import csv
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

import fastadapt.gdpl.loop as gdpl_loop
from fastadapt.cli import main
from fastadapt.gdpl import GDPLConfig, GDPLTrainConfig
from fastadapt.gdpl.config import GDPLRunSettings
from fastadapt.gdpl.evaluate import result_rows
from fastadapt.gdpl.few_shot import draw_splits
from fastadapt.gdpl.prompts import DomainPromptLearner
from tests.helpers.gdpl_models import make_colours, save_source

BASE_TO_NOVEL = {"lr": 0.0035, "epochs": 15, "batch_size": 4}
CROSS_DATA_SET = {"lr": 0.0026, "epochs": 25, "batch_size": 4}
NAMES = ("annual_crop", "forest", "harbour", "river")


def upstream_rates(lr, epochs, steps):
    """build_lr_scheduler(): a cosine with T_max epochs after one epoch at WARMUP_CONS_LR.

    ``update_lr`` steps once at the end of each epoch; the first step ends the warm-up, and the
    cosine begins to move with the second.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=float(epochs))
    rates, now = [], 1e-5
    for last_epoch in range(epochs):
        rates += [now] * steps
        if last_epoch >= 1:
            optimizer.step()
            successor.step()
        now = successor.get_last_lr()[0]
    return rates


def test_settings():
    for classes, upstream in (("base", BASE_TO_NOVEL), ("all", CROSS_DATA_SET)):
        paper, model = GDPLTrainConfig.paper(classes), GDPLConfig.paper(classes)
        assert {name: getattr(paper, name) for name in upstream} == upstream
        assert (paper.optimizer, paper.weight_decay, paper.shots) == ("sgd", 5e-4, 16)
        assert paper.train_classes == classes and paper.clip_grad is None
        # PROMPT_DEPTH; the low-rank updates are always in resblocks[:9]; N_CTX and CTX_INIT.
        assert (model.depth, model.rank_depth) == (9 if classes == "base" else 3, 9)
        assert (model.n_ctx, model.rank, model.alpha) == (2, 4, 1.0)
        assert model.template == "a photo of a {}." and model.noise == "train"
    assert GDPLRunSettings.paper().seeds == (1, 2, 3)


def test_views_are_random_resized_crops_and_left_right_flips():
    """RandomResizedCrop(SIZE, scale=(0.08, 1.0)) and RandomHorizontalFlip(); nothing else."""
    view = GDPLTrainConfig.paper().augmentation()
    assert view.crop_area == (0.08, 1.0) and view.crop_aspect == (3 / 4, 4 / 3)
    assert view.left_right and not (view.flips or view.transpose or view.affine)
    assert not (view.brightness or view.contrast or view.blur or view.erase)


def test_splits_are_half_a_fifth_and_the_rest(tmp_path):
    """read_and_split_data(p_trn=0.5, p_val=0.2), with Python's round()."""
    from fastadapt.data.dataset import read_dataset
    from fastadapt.errors import InputError

    for count in (5, 7, 11, 15):
        root = make_colours(tmp_path / str(count), NAMES[:2], count=count)
        config = GDPLTrainConfig.paper()
        dataset = draw_splits(read_dataset(root), config.val_fraction, config.test_fraction)
        train, val = round(count * 0.5), round(count * 0.2)
        assert Counter((s.label, s.split) for s in dataset.samples) == {
            (label, split): n
            for label in (0, 1)
            for split, n in (("train", train), ("val", val), ("test", count - train - val))
        }
        again = draw_splits(read_dataset(root), config.val_fraction, config.test_fraction)
        assert again == dataset and draw_splits(dataset, 0.2, 0.3) == dataset
    few = make_colours(tmp_path / "few", NAMES[:2], count=2)
    with pytest.raises(InputError, match="'annual_crop' has 2 images, too few"):
        draw_splits(read_dataset(few), 0.2, 0.3)
    with pytest.raises(InputError, match=r"test_fraction is 0\.9 and val_fraction 0\.2"):
        GDPLTrainConfig(test_fraction=0.9)


def test_deep_vision_networks_start_from_one_draw():
    """compound_prompt_projections = _get_clones(single_layer, ...)."""
    learner = DomainPromptLearner(8, 16, 16, depth=4, deep_start="cloned")
    for weight in learner.vision_nets.parameters():
        assert all(torch.equal(a, b) for a, b in pairwise(weight))
    assert learner.vision_nets.r_weight.std() > 0
    assert not torch.equal(*learner.deep_ctx[:2])  # the deep contexts are drawn apart
    other = DomainPromptLearner(8, 16, 16, depth=4).vision_nets.r_weight
    assert not torch.equal(other[0], other[1])


def test_the_deviation_is_numpy_s():
    """parse_test_res.py: np.std(values)."""
    accuracies = [0.5, 0.7, 0.9]
    runs = {str(i): {"metrics": {"all": {"accuracy": a}}} for i, a in enumerate(accuracies)}
    results = {"zero_shot": None, "seeds": runs, "deviation": "population"}
    assert result_rows(results)[-1][1]["all"] == f"70.00 ± {100 * np.std(accuracies):.2f}"
    del results["deviation"]
    assert result_rows(results)[-1][1]["all"] == "70.00 ± 20.00"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gdpl")
    return save_source(folder / "clip", layers=3), make_colours(folder / "data", NAMES, count=12)


def test_a_run(places, tmp_path, monkeypatch, capsys):
    """Two seeds on 12 images a class: 6 train, 2 validate, 4 are tested; the last batch goes."""
    source, data = places
    seen = []
    real = gdpl_loop.training_step

    def training_step(model, optimizer, *args, **options):
        step = real(model, optimizer, *args, **options)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for g in optimizer.param_groups for p in g["params"]}
        seen.append({"optimizer": optimizer, "rates": [], "sizes": []})

        def take(lr, labels, images, *features):
            seen[-1]["rates"].append(lr)
            seen[-1]["sizes"].append(len(images))
            return step(lr, labels, images, *features)

        return take

    monkeypatch.setattr(gdpl_loop, "training_step", training_step)
    args = ["gdpl", data, "--out", tmp_path / "run", "--recipe", "paper", "--quiet"]
    args += ["--clip", source.clip, "--domain-encoder", source.domain_encoder]
    args += ["--domain-weights", source.domain_weights, "--domain-size", 32]
    args += ["--prompt-depth", 2, "--low-rank-depth", 3, "--shots", 5, "--epochs", 3]
    monkeypatch.setattr("sys.argv", ["fastadapt", *map(str, args), "--seeds", "1,2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    settings = results["settings"]
    assert (settings["depth"], settings["rank_depth"], settings["epochs"]) == (2, 3, 3)
    assert (settings["lr"], settings["deep_start"], settings["shots"]) == (0.0035, "cloned", 5)
    assert results["deviation"] == "population"
    assert results["images"] == {"base": 2 * 4, "novel": 2 * 4}  # 30 % of 12, rounded up
    rows = csv.DictReader((tmp_path / "run" / "seed1" / "splits.csv").open())
    assert Counter(row["split"] for row in rows) == {"train": 24, "val": 8, "test": 16}
    assert len(seen) == 2
    for run in seen:
        (group,) = run["optimizer"].param_groups
        assert type(run["optimizer"]) is torch.optim.SGD
        assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
        assert (group["dampening"], group["nesterov"]) == (0, False)
        assert run["sizes"] == [4, 4] * 3  # 2 classes of 5 images: two of the ten are left out
        assert run["rates"] == pytest.approx(upstream_rates(0.0035, 3, 2))
