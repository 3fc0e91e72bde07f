"""Tests of steps and inference as CUDA graphs: the logic with a stand-in, the rest on a GPU."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastadapt as fa
from fastadapt import cuda_graph
from fastadapt.cuda_graph import WARMUP, GraphedCall, GraphedStep
from fastadapt.train.step import training_step
from tests.helpers.cuda_graphs import StandIn, batches, bf16, network, optimizers, same, trained


class TestLogic:
    @pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
    def test_first_steps_are_eager_and_all_of_them_train(self, stand_in, kind):
        graphed = trained(kind, graph=True, dropout=0.3, clip_grad=0.5, label_smoothing=0.1)
        assert (stand_in.eager, stand_in.captures, stand_in.replays) == (WARMUP, 1, 12 - WARMUP)
        same(graphed, trained(kind, graph=False, dropout=0.3, clip_grad=0.5, label_smoothing=0.1))

    def test_a_smaller_last_batch_is_captured_too(self, stand_in):
        sizes = (8, 8, 3)
        same(trained(graph=True, sizes=sizes), trained(graph=False, sizes=sizes))
        # The fourth step captures 8 rows, the sixth 3.
        assert (stand_in.captures, stand_in.eager, stand_in.replays) == (2, 5, 7)

    def test_the_size_that_comes_first_often_enough_is_captured(self, stand_in):
        trained(graph=True, sizes=(3, 8, 8))  # steps 5 and 7 capture 8 rows and 3
        assert (stand_in.captures, stand_in.replays) == (2, 6)

    def test_there_are_no_more_graphs_than_asked_for(self, stand_in):
        step = GraphedStep(lambda x: (2 * x,))
        for rows in [1] * WARMUP + [2, 3, 1, 2, 3, 3]:
            assert torch.equal(step(torch.ones(rows))[0], torch.full((rows,), 2.0))
        assert (stand_in.captures, stand_in.replays) == (2, 2)

    def test_a_size_that_cannot_be_captured_stays_eager(self, monkeypatch):
        class Small(StandIn):
            def watch(self, call):
                outputs, _ = super().watch(call)
                return outputs, "it does not fit" if len(outputs[0]) == 2 else None

        gpu, said = Small().install(monkeypatch), []
        step = GraphedStep(lambda x: (2 * x,), say=said.append)
        for rows in [1] * WARMUP + [2, 1, 2, 1]:
            step(torch.ones(rows))
        assert (gpu.captures, gpu.replays, gpu.eager, said) == (1, 2, WARMUP + 2, [])

    @pytest.mark.parametrize("how", ["waits", "fails"])
    def test_what_cannot_be_captured_stays_eager_and_says_so_once(self, monkeypatch, how):
        said = []
        reason = "the step waits for the GPU"
        settings = {"why_not": reason} if how == "waits" else {"error": RuntimeError(reason + "\n")}
        gpu = StandIn(**settings).install(monkeypatch)
        same(trained(graph=True, say=said.append), trained(graph=False))
        assert said == [f"training runs operator by operator, without a CUDA graph: {reason}"]
        assert (gpu.eager, gpu.replays, gpu.captures) == (12, 0, int(how == "fails"))

    def test_without_a_gpu_nothing_changes(self):
        step = GraphedStep(lambda x: x * 2)
        x = torch.ones(3, requires_grad=True)
        for _ in range(2 * WARMUP):
            y = step(x)
            assert torch.equal(y, torch.full((3,), 2.0)) and not y.requires_grad
        assert not step.captured

    def test_inputs_and_outputs_are_copies(self, stand_in):
        step = GraphedStep(lambda x: (x + 1, x.sum()))
        kept = [(x := torch.full((2, 2), float(i)), *step(x)) for i in range(8)]
        assert step.captured
        for index, (x, y, total) in enumerate(kept):
            assert x.eq(index).all() and y.eq(index + 1).all() and total == 4 * index

    def test_the_layout_of_the_inputs_stays(self, stand_in):
        seen = []
        step = GraphedStep(lambda x: seen.append(x.stride()) or (x.sum(),))
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        for _ in range(5):
            step(x)
        assert set(seen) == {x.stride()} and stand_in.replays == 2

    def test_a_scaled_loss_is_not_captured(self, stand_in):
        scaler = torch.amp.GradScaler("cpu", enabled=True)
        trained("sgd", graph=True, scaler=scaler)
        assert stand_in.eager == stand_in.captures == 0


def test_functions_are_called_before_replays(monkeypatch):
    class Capturing(StandIn):
        def capture(self, step):
            step()
            return super().capture(step)

    gpu, called = Capturing().install(monkeypatch), []

    def step(x):
        cuda_graph.before_replays(lambda: called.append(gpu.replays))
        return (2 * x,)

    graphed = GraphedStep(step)
    for _ in range(WARMUP + 2):
        graphed(torch.ones(3))
    assert graphed.captured and called == [0, 1]
    assert not cuda_graph.before_replays(print)


class TestCalls:
    """Inference."""

    def test_a_shape_is_captured_when_it_comes(self, stand_in):
        model = network()
        call = GraphedCall(model)
        for index, (x, _) in enumerate(batches(9, sizes=(8, 3, 5)), start=1):
            y = call(x)
            assert torch.equal(y, model(x)) and not y.requires_grad
            assert stand_in.captures == call.captured == min(index, 3)
            assert stand_in.replays == index
        assert stand_in.eager == 3 * WARMUP

    def test_there_are_no_more_than_asked_for(self, stand_in):
        model = network()
        call = GraphedCall(model, most=1)
        for x, _ in batches(9, sizes=(8, 3, 5)):
            assert torch.equal(call(x), model(x))
        assert (stand_in.captures, stand_in.replays) == (1, 3)

    def test_outputs_are_copies(self, stand_in):
        call = GraphedCall(lambda x: (x + 1, x.sum(1)))
        kept = [(x := torch.full((2, 2), float(i)), *call(x)) for i in range(5)]
        for index, (x, y, total) in enumerate(kept):
            assert x.eq(index).all() and y.eq(index + 1).all() and total.eq(2 * index).all()

    @pytest.mark.parametrize("first", [torch.inference_mode, nullcontext])
    def test_called_in_inference_mode_and_outside(self, stand_in, first):
        model = network()
        call = GraphedCall(model)
        contexts = (first, nullcontext, torch.inference_mode, first)
        for (x, _), context in zip(batches(4), contexts, strict=True):
            with context():
                x = x.clone()
                assert torch.equal(call(x), model(x))
        assert stand_in.captures == 1

    @pytest.mark.parametrize("how", ["waits", "fails"])
    def test_what_cannot_be_captured_stays_eager(self, monkeypatch, how):
        said = []
        reason = "the step waits for the GPU"
        settings = {"why_not": reason} if how == "waits" else {"error": RuntimeError(reason)}
        gpu = StandIn(**settings).install(monkeypatch)
        model = network()
        call = GraphedCall(model, say=said.append)
        for x, _ in batches(6, sizes=(8, 3)):
            assert torch.equal(call(x), model(x))
        line = f"inference runs operator by operator, without a CUDA graph: {reason}"
        assert said == [line] * 2, "once for each shape"
        assert call.captured == gpu.replays == 0

    def test_a_call_that_fails_does_so_again(self, stand_in):
        call = GraphedCall(network())
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                call(torch.ones(2, 5))
        assert call(torch.ones(2, 12)).shape == (2, 5) and stand_in.captures == 1

    def test_without_a_gpu_nothing_is_called_twice(self):
        calls = []
        call = GraphedCall(lambda x: calls.append(x) or x * 2)
        assert torch.equal(call(torch.ones(3)), torch.full((3,), 2.0))
        assert len(calls) == 1 and not call.captured


class Waits(nn.Module):
    """Asks for a number on the host: no graph can."""

    def __init__(self, device):
        super().__init__()
        self.inner = network(device, dropout=0.2)

    def forward(self, x):
        return self.inner(x) * (1.0 if x.abs().sum().item() >= 0 else 2.0)


class WaitsInACapture(Waits):
    """Only there, where no call before could tell."""

    def forward(self, x):
        y = self.inner(x)
        if torch.cuda.is_current_stream_capturing():
            y.sum().item()
        return y


class FailsInACapture(Waits):
    def forward(self, x):
        y = self.inner(x)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("no graphs here")
        return y


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
class TestOnAGPU:
    @pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_a_graph_trains_bit_for_bit_as_eager(self, kind, dropout):
        """With a learning rate that moves, momentum, clipping, dropout and an odd last batch."""
        settings = {"clip_grad": 0.5, "label_smoothing": 0.1, "sizes": (8, 8, 8, 3)}
        settings |= {"class_weights": torch.arange(1.0, 6.0, device="cuda"), "steps": 40}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*capturable")
            graphed = trained(kind, graph=True, device="cuda", dropout=dropout, **settings)
        same(graphed, trained(kind, graph=False, device="cuda", dropout=dropout, **settings))

    def test_the_graph_is_used(self, monkeypatch):
        captured = []
        real = cuda_graph.GraphCapture.capture
        monkeypatch.setattr(
            cuda_graph.GraphCapture, "capture", lambda *a: captured.append(real(*a)) or captured[-1]
        )
        trained(graph=True, device="cuda")
        assert len(captured) == 1

    def test_the_learning_rate_takes_effect(self):
        """At a rate of 0 nothing moves, after that something does."""
        model = network("cuda")
        step = training_step(model, optimizers("sgd", model.parameters(), "cuda"), graph=True)
        x, labels = next(batches(1, "cuda"))
        for _ in range(WARMUP + 2):
            step(0.01, labels, x)
        before = [p.detach().clone() for p in model.parameters()]
        step(0.0, labels, x)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        step(0.01, labels, x)
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_dropout_differs_from_step_to_step(self):
        x = torch.ones(64, 64, device="cuda")
        step = GraphedStep(lambda x: F.dropout(x, 0.5))
        torch.manual_seed(0)
        masks = [step(x) for _ in range(WARMUP + 4)]
        assert step.captured
        for index, mask in enumerate(masks):
            assert not any(torch.equal(mask, other) for other in masks[:index])
        torch.manual_seed(0)
        again = [step(x) for _ in range(WARMUP + 4)]
        assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))

    @pytest.mark.parametrize("kind", [Waits, WaitsInACapture, FailsInACapture])
    def test_what_cannot_be_captured_stays_eager(self, kind):
        """And leaves nothing behind: random numbers, memory and later captures are as ever."""
        said = []

        def weights(graph):
            model = kind("cuda")
            optimizer = optimizers("adamw", model.parameters(), "cuda")
            step = training_step(model, optimizer, graph=graph, say=said.append)
            torch.manual_seed(2)
            for x, labels in batches(10, "cuda"):
                step(0.01, labels, x)
            return [p.detach() for p in model.parameters()]

        graphed = weights(True)
        assert len(said) == 1 and "without a CUDA graph: " in said[0]
        assert all(torch.equal(a, b) for a, b in zip(graphed, weights(False), strict=True))
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        settings = {"device": "cuda", "dropout": 0.3}
        same(trained(graph=True, **settings), trained(graph=False, **settings))

    def test_too_little_memory(self, monkeypatch):
        said = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (-(2**50), 2**50))
        same(
            trained(graph=True, device="cuda", say=said.append),
            trained(graph=False, device="cuda"),
        )
        assert len(said) == 1 and "MiB are free" in said[0]

    def test_its_memory_is_freed(self):
        model = network("cuda")
        _, labels = next(batches(1, "cuda"))
        trained(graph=True, device="cuda")  # workspaces of libraries stay
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        step = training_step(model, optimizers("sgd", model.parameters(), "cuda"), graph=True)
        big = torch.randn(1 << 18, 12, device="cuda")
        for _ in range(WARMUP + 2):
            step(0.01, labels.repeat(1 << 15), big)
        assert torch.cuda.memory_reserved() > before + 2**24
        del step, big
        model.zero_grad()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before + 2**22

    def test_autocast(self):
        found = [trained(graph=g, device="cuda", autocast=bf16, steps=20) for g in (True, False)]
        same(*found)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("half", [True, False])
    def test_our_operators(self, monkeypatch, backend, half):
        """Cluster attention and quaternion layers, kernels and reference, captured and eager."""
        monkeypatch.setenv("FASTADAPT_BACKEND", backend)

        def train_layers(graph):
            torch.manual_seed(0)
            model = nn.Sequential(
                fa.CLAdapter(64, num_centers=5, rank=16, mlp_ratio=1.0),
                fa.QuaternionLinear(64, 32),
                fa.QuaternionLinear(32, 32, rotation=True),
                nn.Flatten(),
                nn.Linear(49 * 32, 5),
            ).cuda()
            step = training_step(
                model,
                optimizers("sgd", model.parameters(), "cuda"),
                lambda: torch.autocast("cuda", torch.bfloat16, enabled=half),
                graph=graph,
                say=said.append,
            )
            torch.manual_seed(1)
            losses = []
            for _ in range(12):
                x = torch.randn(16, 49, 64, device="cuda")
                losses.append(step(0.01, torch.randint(5, (16,), device="cuda"), x)[0])
            return torch.stack(losses), nn.utils.parameters_to_vector(model.parameters()).detach()

        said = []
        (losses, weights), (eager_losses, eager) = train_layers(True), train_layers(False)
        assert not said
        loose = 2e-2 if half else 1e-4
        torch.testing.assert_close(losses, eager_losses, rtol=loose, atol=loose)
        assert (weights - eager).norm() <= loose * eager.norm()

    def test_inference(self):
        """Of a folded adapter, one graph for each batch size, also of a model that moves on."""
        torch.manual_seed(0)
        backbone = nn.Conv2d(3, 64, 8, stride=8)
        config = fa.AdaptConfig(rank=16, num_centers=5, input_size=(3, 32, 32))
        folded = fa.fold(fa.adapt(backbone, config, num_classes=5)).cuda()
        call = GraphedCall(folded)
        for index in range(6):
            x = torch.randn((4, 1)[index % 2], 3, 32, 32, device="cuda")
            with torch.inference_mode():
                want = folded(x)
            torch.testing.assert_close(call(x), want, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                folded.head.bias += 1  # in place: replays see it
        assert call.captured == 2

    @pytest.mark.parametrize("kind", [Waits, WaitsInACapture, FailsInACapture])
    def test_inference_that_cannot_be_captured_stays_eager(self, kind):
        said, model = [], kind("cuda").eval()
        call = GraphedCall(model, say=said.append)
        for x, _ in batches(6, "cuda", sizes=(8, 3)):
            assert torch.equal(call(x), model(x))
        assert len(said) == 2 and "inference runs operator by operator" in said[0]
        assert not call.captured
        settings = {"device": "cuda", "dropout": 0.3}
        same(trained(graph=True, **settings), trained(graph=False, **settings))

    def test_memory_of_inference_is_freed(self):
        model = network("cuda")
        GraphedCall(model)(torch.randn(8, 12, device="cuda"))  # workspaces of libraries stay
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        call = GraphedCall(model)
        call(torch.randn(1 << 18, 12, device="cuda"))
        assert call.captured and torch.cuda.memory_reserved() > before + 2**24
        del call
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before + 2**22
