"""Tests of the training loop of adapters with CUDA graphs, against itself without them."""

from dataclasses import replace

import pytest
import torch

import fastadapt as fa
from fastadapt.cuda_graph import WARMUP
from fastadapt.files import read_tensors
from fastadapt.train import loop as trainer
from fastadapt.train.run import TrainConfig, train
from tests.helpers.cuda_graphs import StandIn, count_replays, near, rows_of
from tests.helpers.imagesets import make_folders
from tests.helpers.shallow_models import SHALLOW_VIT

ADAPT = fa.AdaptConfig(rank=8, num_centers=4, mlp_ratio=1.0, input_size=(3, 48, 48), proj_drop=0.2)
# 18 training images: two batches of eight and an odd one.
CONFIG = TrainConfig(
    stages=2, epochs=12, epochs2=10, lr=3e-3, batch_size=8, val_fraction=0.25, clip_grad=1.0
)
SMALL_DATA = replace(
    CONFIG,
    mixup=0.4,
    cutmix=1.0,
    ema=0.9,
    layer_decay=0.7,
    unfreeze_last=2,
    augment="dihedral",
    views=2,
    rotation=10.0,
    brightness=0.1,
    blur=1.0,
    erase=0.2,
)
# On a GPU rounding may differ; small steps keep it small.
SLOW = replace(CONFIG, lr=3e-4, lr2=1e-5)


def run(data, out, config=CONFIG, backbone=SHALLOW_VIT, **options):
    options = {"workers": 1, "save_every": 0, **options}
    train(data, out, backbone, config, ADAPT, pretrained=False, **options)
    return read_tensors(out / "adapter.safetensors")[0], rows_of(out)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("images") / "data", 8)


def interrupt_after(monkeypatch, epoch):
    save = trainer.save_state

    def saved(state, *args):
        save(state, *args)
        if (state.stage, state.epoch) == (1, epoch):
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_state", saved)


class TestWithAStandIn:
    @pytest.mark.parametrize("cache", [True, False])
    def test_stages_of_an_adapter(self, images, tmp_path, monkeypatch, cache):
        config = replace(CONFIG, cache=cache, class_weights="balanced", label_smoothing=0.1)
        weights, rows = run(images, tmp_path / "eager", replace(config, cuda_graph="off"))
        gpu = StandIn().install(monkeypatch)
        graphed, graphed_rows = run(images, tmp_path / "graphed", config)
        assert gpu.captures == 4, "one for each stage and size"
        # The odd batch runs twice before its capture: the other size is captured in between.
        assert gpu.replays == 3 * (12 + 10) - 2 * (WARMUP + 2)
        assert rows == graphed_rows
        for name, tensor in weights.items():
            assert torch.equal(tensor, graphed[name]), name

    def test_what_helps_small_data(self, images, tmp_path, monkeypatch):
        """Mixed labels, layers' own rates and the average are outside the graph, or its inputs."""
        config = replace(SMALL_DATA, epochs=10, epochs2=10)
        weights, rows = run(images, tmp_path / "eager", replace(config, cuda_graph="off"))
        gpu = StandIn().install(monkeypatch)
        graphed, graphed_rows = run(images, tmp_path / "graphed", config)
        assert gpu.captures == 4 and rows == graphed_rows
        for name, tensor in weights.items():
            assert torch.equal(tensor, graphed[name]), name

    def test_an_interrupted_run(self, images, tmp_path, stand_in):
        config = replace(CONFIG, stages=1, epochs=16)
        whole, rows = run(images, tmp_path / "whole", config)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, 5)
            run(images, tmp_path / "run", config)
        # With the other setting, too: it does not belong to the run.
        resumed, found = run(
            images, tmp_path / "run", replace(config, cuda_graph="off"), resume=True
        )
        assert rows == found
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name

    def test_few_steps_are_not_worth_it(self, images, tmp_path, stand_in):
        run(images, tmp_path / "run", replace(CONFIG, stages=1, epochs=9))
        assert stand_in.captures == stand_in.eager == 0

    def test_the_setting(self):
        with pytest.raises(fa.InputError, match="cuda_graph is 'on'; expected auto or off"):
            TrainConfig(cuda_graph="on")


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
class TestOnAGPU:
    @pytest.mark.parametrize(
        ("backbone", "cache", "amp"),
        [
            ("test_vit", True, "off"),
            ("test_vit", False, "bf16"),
            ("test_efficientnet", True, "bf16"),
            ("test_efficientnet", False, "off"),
        ],
    )
    def test_stages_of_an_adapter(self, images, tmp_path, monkeypatch, backbone, cache, amp):
        replays = count_replays(monkeypatch)
        config = replace(SLOW, amp=amp, cache=cache)
        off = replace(config, cuda_graph="off")
        eager, rows = run(images, tmp_path / "eager", off, backbone, device="cuda")
        assert not replays
        graphed, graphed_rows = run(images, tmp_path / "graphed", config, backbone, device="cuda")
        # Three steps an epoch; the last, smaller batch is filled up but where batch norms train,
        # and runs twice there before it is captured.
        own_size = backbone == "test_efficientnet"
        assert len(replays) == 3 * (12 + 10) - 2 * WARMUP - (2 if own_size else 0)
        near(rows, graphed_rows, 1e-3 if amp == "off" else 5e-2)
        assert eager.keys() == graphed.keys()

    @pytest.mark.parametrize("amp", ["off", "bf16"])
    def test_what_helps_small_data(self, images, tmp_path, monkeypatch, amp):
        replays = count_replays(monkeypatch)
        config = replace(SMALL_DATA, amp=amp, lr=3e-4)
        off = replace(config, cuda_graph="off")
        eager, rows = run(images, tmp_path / "eager", off, device="cuda")
        assert not replays
        graphed, graphed_rows = run(images, tmp_path / "graphed", config, device="cuda")
        assert len(replays) == 3 * (12 + 10) - 2 * WARMUP
        near(rows, graphed_rows, 1e-3 if amp == "off" else 5e-2)
        assert eager.keys() == graphed.keys()

    def test_an_interrupted_run(self, images, tmp_path):
        config = replace(SLOW, stages=1, epochs=16, amp="off")
        _, rows = run(images, tmp_path / "whole", config, device="cuda")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, 5)
            run(images, tmp_path / "run", config, device="cuda")
        _, resumed = run(images, tmp_path / "run", config, device="cuda", resume=True)
        near(rows, resumed, 1e-3)

    def test_fp16_stays_eager(self, images, tmp_path, monkeypatch):
        replays = count_replays(monkeypatch)
        run(images, tmp_path / "run", replace(CONFIG, stages=1, amp="fp16"), device="cuda")
        assert not replays
