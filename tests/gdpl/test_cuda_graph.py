"""Tests of GDPL's training and evaluation with CUDA graphs, against themselves without them."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import fastadapt as fa
from fastadapt.cuda_graph import WARMUP
from fastadapt.data.dataset import read_dataset
from fastadapt.data.preprocess import Preprocess
from fastadapt.files import read_tensors
from fastadapt.gdpl import GDPLConfig, GDPLTrainConfig, evaluate, train_gdpl
from fastadapt.gdpl.few_shot import of_classes
from fastadapt.progress import progress_bars
from tests.helpers.cuda_graphs import StandIn, bf16, count_replays, near, rows_of
from tests.helpers.gdpl_models import make_colours, save_source

PLACES = ("annual_crop", "forest", "harbour", "industrial_area", "river")


def measured(places, monkeypatch, *, graph, device="cpu", amp=nullcontext, least=3):
    """Metrics of two tasks with other classes, of CLIP alone and of GDPL."""
    source, data = places
    monkeypatch.setattr(evaluate, "LEAST_STEPS", least)
    torch.manual_seed(0)
    model = source.create(PLACES, GDPLConfig(depth=2, rank=2, rank_depth=2)).to(device)
    images = Preprocess.from_pretrained_cfg(model.pretrained_cfg)
    samples = read_dataset(data, 0.2).samples
    with progress_bars(quiet=True) as progress:
        evaluator = evaluate.Evaluator(
            images, torch.device(device), 1, amp, progress, batch_size=4, graph=graph
        )
        found = []
        for name, classes in (("base", range(2)), ("novel", range(2, 5))):
            chosen = tuple(of_classes(samples, classes))
            task = evaluate.Task(name, chosen, PLACES[classes.start : classes.stop])
            found += [evaluator.measure(model, task, zero_shot) for zero_shot in (True, False)]
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gdpl")
    return save_source(folder / "clip"), make_colours(folder / "data", PLACES)


class TestWithAStandIn:
    @pytest.mark.parametrize("augment", ["none", "crops"])
    def test_gdpl(self, places, tmp_path, monkeypatch, augment):
        source, data = places
        config = GDPLTrainConfig(shots=3, epochs=12, lr=5e-3, val_fraction=0.4, augment=augment)
        gdpl = GDPLConfig(depth=2, rank=2, rank_depth=2)
        train_gdpl(data, tmp_path / "eager", source, replace(config, cuda_graph="off"), gdpl)
        gpu = StandIn().install(monkeypatch)
        train_gdpl(data, tmp_path / "graphed", source, config, gdpl)
        # 9 images: two batches of four and one image, which runs twice before its capture.
        assert (gpu.captures, gpu.replays) == (2, 3 * 12 - (WARMUP + 2))
        first, second = (
            read_tensors(tmp_path / name / "adapter.safetensors")[0]
            for name in ("eager", "graphed")
        )
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name
        assert rows_of(tmp_path / "eager") == rows_of(tmp_path / "graphed")

    def test_gdpl_s_evaluation(self, places, monkeypatch):
        want = measured(places, monkeypatch, graph=False)
        gpu = StandIn().install(monkeypatch)
        assert measured(places, monkeypatch, graph=True) == want
        # Two classes are three batches of four, three are four batches and two images; with CLIP
        # alone and without.
        assert (gpu.captures, gpu.replays) == (4, 2 * (3 + 4))

    def test_few_batches_are_not_worth_it(self, places, monkeypatch, stand_in):
        measured(places, monkeypatch, graph=True, least=5)
        assert stand_in.captures == 0

    def test_the_setting(self):
        with pytest.raises(fa.InputError, match="cuda_graph is 'on'; expected auto or off"):
            GDPLTrainConfig(cuda_graph="on")


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
class TestOnAGPU:
    @pytest.mark.parametrize("amp", [nullcontext, bf16])
    def test_gdpl_s_evaluation(self, places, monkeypatch, amp):
        want = measured(places, monkeypatch, graph=False, device="cuda", amp=amp)
        replays = count_replays(monkeypatch)
        assert measured(places, monkeypatch, graph=True, device="cuda", amp=amp) == want
        assert len(replays) == 2 * (3 + 4)

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    @pytest.mark.parametrize("amp", ["off", "bf16"])
    def test_gdpl(self, places, tmp_path, monkeypatch, amp, optimizer):
        source, data = places
        replays = count_replays(monkeypatch)
        config = GDPLTrainConfig(
            shots=3, epochs=12, lr=1e-3, val_fraction=0.4, amp=amp, optimizer=optimizer
        )
        gdpl = GDPLConfig(depth=2, rank=2, rank_depth=2)
        off = replace(config, cuda_graph="off")
        train_gdpl(data, tmp_path / "eager", source, off, gdpl, device="cuda")
        assert not replays
        train_gdpl(data, tmp_path / "graphed", source, config, gdpl, device="cuda")
        assert len(replays) == 3 * 12 - (WARMUP + 2)
        loose = 1e-3 if amp == "off" else 5e-2
        near(rows_of(tmp_path / "eager"), rows_of(tmp_path / "graphed"), loose)
