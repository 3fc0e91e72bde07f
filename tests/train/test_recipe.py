"""``--recipe paper`` beside CLAdapter's code, restated here from that code and not from ours.

``COMMAND`` is the README's, ``CONFIG`` is config_clip_vit.py's.
"""

import json
import math

import numpy as np
import pytest
import torch

import fastadapt as fa
from fastadapt import cli
from fastadapt.data.augment import DRAWS, draw
from fastadapt.data.resize import Geometry
from fastadapt.train import TrainConfig
from fastadapt.train import loop as trainer
from fastadapt.train.config import ImageSettings
from fastadapt.train.metrics import scores
from fastadapt.train.selection import better
from tests.helpers.imagesets import make_folders

COMMAND = {"epochs": 100, "init_lr": 1e-4, "batch_size": 8, "warmup_epochs": 2}
CONFIG = {"name": "Adam", "weight_decay": 1e-3, "centers": 20, "layers": 1, "mlp_ratio": 4.0}


def upstream_rates(epochs, steps, peak):
    """main(), train_epoch(), get_warm_up_lr(), get_train_epoch_lr()."""
    rates, end = [], epochs + 1
    for epoch in range(1, end):
        for step in range(steps):
            now = (epoch - 1) * steps + step
            warm = now / (COMMAND["warmup_epochs"] * steps)
            if epoch <= COMMAND["warmup_epochs"]:
                rates.append(peak * min(0.01 * (1 - warm) + warm, 1.0))
            else:
                rates.append(0.5 * peak * (1 + math.cos(math.pi * now / (end * steps))))
    return rates


def test_settings():
    paper = TrainConfig.paper()
    assert (paper.epochs, paper.lr, paper.batch_size) == (100, 1e-4, 8)
    assert (paper.epochs2, paper.lr2, paper.of_stage(2)[2]) == (100, 1e-4 / 10, 8)
    off = (paper.label_smoothing, paper.mixup, paper.cutmix, paper.ema, paper.clip_grad)
    assert not any(off) and paper.layer_decay == 1 and paper.patience is None
    assert paper.class_weights == "none" and paper.seed == 1
    adapter = fa.AdaptConfig.paper()
    assert adapter == fa.AdaptConfig() and (adapter.num_centers, adapter.depth) == (20, 1)
    assert (adapter.rank, adapter.mlp_ratio, adapter.drop_path) == (256, CONFIG["mlp_ratio"], 0)
    images = ImageSettings.paper().preprocess()
    assert images == {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    assert TrainConfig.paper(lr=0.5).lr == 0.5


class Spy:
    """The optimizers, learning rates and batches of a run."""

    def __init__(self, monkeypatch):
        self.optimizers, self.rates, self.sizes, self.shares = [], [], [], []
        real = trainer.training_step

        def training_step(logits, optimizer, *args, **options):
            step = real(logits, optimizer, *args, **options)
            self.optimizers.append(optimizer)
            self.options = options
            self.rates.append([])
            self.sizes.append([])

            def take(lr, labels, *inputs):
                self.rates[-1].append(lr)
                self.sizes[-1].append(tuple(inputs[0].shape))
                return step(lr, labels, *inputs)

            return take

        monkeypatch.setattr(trainer, "training_step", training_step)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Runs ``fastadapt train`` with the paper's recipe on 21 images: 15 train, in 1 batch of 8."""
    data = make_folders(tmp_path / "data", 7)
    spy = Spy(monkeypatch)

    def call(*options):
        args = ["train", data, "--backbone", "test_vit", "--out", tmp_path / "run", "--recipe"]
        args += ["paper", "--no-pretrained", "--image-size", "32", "--workers", "1", "--quiet"]
        args += ["--val-fraction", "0.25", *options]
        monkeypatch.setattr("sys.argv", ["fastadapt", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, capsys.readouterr().err
        settings = json.loads((tmp_path / "run" / "config.json").read_text())
        return spy, settings

    return call


def test_a_run_in_two_steps(train):
    spy, config = train("--rank", "4", "--centers", "2", "--epochs", "3", "--epochs2", "1")
    settings = config["train"]["settings"]
    assert (settings["rank"], settings["epochs"]) == (4, 3)  # given: they win
    assert (settings["lr"], settings["select"], settings["ties"]) == (1e-4, "accuracy", "later")
    assert settings["cache"] is False and settings["crop_mode"] == "squash"
    assert len(spy.optimizers) == 2
    for optimizer, epochs, rates, sizes, peak in zip(
        spy.optimizers, (3, 1), spy.rates, spy.sizes, (1e-4, 1e-5), strict=True
    ):
        assert type(optimizer).__name__ == CONFIG["name"]
        assert all(g["weight_decay"] == CONFIG["weight_decay"] for g in optimizer.param_groups)
        assert all(g["betas"] == (0.9, 0.999) for g in optimizer.param_groups)
        assert set(sizes) == {(8, 3, 32, 32)}  # drop_last=True, and images, not cached features
        assert rates == pytest.approx(upstream_rates(epochs, 15 // 8, peak), rel=1e-12)
    counts = [sum(len(g["params"]) for g in o.param_groups) for o in spy.optimizers]
    assert counts[0] == 20 and counts[1] > counts[0] + 50  # adapter and head; everything
    assert spy.options["label_smoothing"] == 0 and spy.options["clip_grad"] is None


@pytest.mark.parametrize(("mode", "trained"), [("linear", 2), ("full", 80)])
def test_a_run_without_adapter(train, mode, trained):
    """The head reads the class token; full training has no step before it."""
    spy, config = train(*(["--full"] if mode == "full" else ["--adapter", "none"]), "--epochs", "1")
    assert config["adapt"]["adapter"] == "none" and config["adapt"]["pool"] == "token"
    (optimizer,) = spy.optimizers
    assert sum(len(g["params"]) for g in optimizer.param_groups) == trained
    assert spy.rates[0] == pytest.approx(upstream_rates(1, 1, 1e-4))


class TestTransforms:
    """``get_transforms`` of dataset.py: albumentations' classes, restated in pixel coordinates."""

    SIZE = 33

    def drawn(self, count):
        """Every random number of albumentations, from ours: where in its range, and whether."""
        table = draw(7, 1, count)
        between = lambda u, limit: -limit + 2 * limit * float(u)  # noqa: E731
        for u in table:
            yield {
                "horizontal": u[0] < 0.5,
                "vertical": u[1] < 0.5,
                "color": u[14] < 0.5,
                "alpha": 1 + between(u[12], 0.1),
                "beta": between(u[13], 0.1),
                "affine": u[7] < 0.7,
                "angle": between(u[8], 180),
                "scale": 1 + between(u[9], 0.3),
                "dx": between(u[10], 0.05),
                "dy": between(u[11], 0.05),
            }

    def upstream(self, image, p):
        """HorizontalFlip, VerticalFlip, RandomBrightnessContrast, ShiftScaleRotate, in order."""
        image = image.astype(np.float64)
        image = image[:, ::-1] if p["horizontal"] else image
        image = image[::-1] if p["vertical"] else image
        if p["color"]:
            image = (image * p["alpha"] + p["beta"] * 255).clip(0, 255)
        if not p["affine"]:
            return image
        height, width = image.shape[:2]
        # cv2.getRotationMatrix2D, a positive angle turns against the clock; then the shift.
        center = np.array([width / 2 - 0.5, height / 2 - 0.5])
        a = p["scale"] * math.cos(math.radians(p["angle"]))
        b = p["scale"] * math.sin(math.radians(p["angle"]))
        forward = np.array([[a, b], [-b, a]])
        offset = center - forward @ center + np.array([p["dx"] * width, p["dy"] * height])
        backward = np.linalg.inv(forward)
        result = np.zeros_like(image)  # border_mode=0: black
        for row in range(height):
            for column in range(width):
                x, y = backward @ (np.array([column, row]) - offset)
                left, top = math.floor(x), math.floor(y)
                for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    r, c = top + i, left + j
                    if 0 <= r < height and 0 <= c < width:
                        weight = (y - top if i else 1 - y + top) * (x - left if j else 1 - x + left)
                        result[row, column] += weight * image[r, c]
        return result

    def test_views_are_upstream_s(self):
        count, size = 12, self.SIZE
        images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
        augmentation = TrainConfig.paper().augmentation()
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        views = augmentation.apply(batch, torch.from_numpy(draw(7, 1, count)), Geometry(size, size))
        plans = list(self.drawn(count))
        assert {plan["affine"] for plan in plans} == {plan["color"] for plan in plans}
        for image, view, plan in zip(images, views, plans, strict=True):
            expected = self.upstream(image, self.mirrored(plan))
            np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), expected, atol=0.05)

    def mirrored(self, plan):
        """Ours flips last and shifts to the other side: signs that are as likely either way."""
        x, y = (-1 if plan["horizontal"] else 1), (-1 if plan["vertical"] else 1)
        return plan | {
            "angle": plan["angle"] * x * y,
            "dx": -plan["dx"] * x,
            "dy": -plan["dy"] * y,
        }

    def test_how_often(self):
        plans = list(self.drawn(4000))
        for name, share in (("horizontal", 0.5), ("vertical", 0.5), ("color", 0.5)):
            assert np.mean([plan[name] for plan in plans]) == pytest.approx(share, abs=0.03)
        assert np.mean([plan["affine"] for plan in plans]) == pytest.approx(0.7, abs=0.03)
        assert draw(0, 1, 1).shape[1] == DRAWS


def test_of_equal_epochs_the_later_is_kept():
    """``if acc >= best_acc`` of main()."""
    kept, best = None, -1
    accuracies = [0.5, 0.75, 0.75, 0.6, 0.75, 0.7]
    for epoch, accuracy in enumerate(accuracies):
        if accuracy >= best:
            kept, best = epoch, accuracy
    losses = [0.1, 0.1, 0.9, 0.1, 0.9, 0.1]
    config = TrainConfig.paper()
    history = [
        {"val_accuracy": a, "val_loss": loss} for a, loss in zip(accuracies, losses, strict=True)
    ]
    best_now = None
    for index in range(len(history)):
        if best_now is None or better(history, index, best_now, config):
            best_now = index
    assert best_now == kept == 4


def test_f1():
    """precision(), recall() and f1_score() of metric.py."""
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    predicted = logits.argmax(1)
    precision = recall = 0.0
    for k in range(3):
        p, g = predicted == k, target == k
        precision += (p * g).sum() / (p.sum() + 1e-7) / 3
        recall += (p * g).sum() / (g.sum() + 1e-7) / 3
    found = scores(target, predicted, np.full((60, 3), 1 / 3), ("a", "b", "c"))
    assert found["f1_of_means"] == pytest.approx(2 * precision * recall / (precision + recall))
