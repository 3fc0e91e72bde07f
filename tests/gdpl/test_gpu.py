"""GDPL on a GPU: the CPU's results, half precision, and steps that never wait for the GPU."""

import json
from dataclasses import replace
from statistics import median as median_of

import pytest
import timm
import torch
import torch.nn.functional as F

import fastadapt as fa
from fastadapt.cuda_graph import WARMUP
from fastadapt.gdpl import GDPLConfig, GDPLTrainConfig, load_gdpl, train_gdpl
from fastadapt.gdpl.loop import make_optimizer
from fastadapt.train.step import training_step
from tests.gdpl.test_model import NAMES, SMALL, WIDTH, randomize, small_model, trained
from tests.helpers.gdpl_models import clip_model, make_colours, save_source

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ADAMW = GDPLTrainConfig(lr=3e-3, optimizer="adamw")
QUIET = replace(SMALL, noise="off")


@pytest.fixture(autouse=True)
def _no_tf32():
    modules = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = False
    yield
    for module, value in zip(modules, allowed, strict=True):
        module.allow_tf32 = value


def batch(count=4, dtype=torch.float32, device=DEVICE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)
    f = torch.randn(count, WIDTH, dtype=torch.float64, generator=generator)
    labels = torch.arange(count) % len(NAMES)
    return x.to(device, dtype), f.to(device, dtype), labels.to(device)


def logits_and_gradients(model, x, f, labels):
    model.zero_grad()
    logits = model(x, f)
    F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels).backward()
    # Deeper prompts at depth 1 are empty, and get no gradient.
    parameters = {name: p for name, p in trained(model).items() if p.numel()}
    got = {name: p.grad.detach().double().cpu() for name, p in parameters.items()}
    return {"logits": logits.detach().double().cpu(), **got}


@pytest.mark.parametrize("config", [{}, {"class_chunk": 2}, {"depth": 1}, {"rank": 0}], ids=str)
def test_equals_the_cpu_in_fp32(config):
    """As exact as the CPU: both are measured against the CPU in fp64, by medians of their errors.

    Some parameters are a few numbers, with which either is now and then several times as lucky.
    """
    config = replace(QUIET, **config)
    model = randomize(small_model(config)).train()
    exact = {name: t.clone() for name, t in model.state_dict().items()}
    seeds = range(1, 10)
    cpu = [logits_and_gradients(model, *batch(device="cpu", seed=seed)) for seed in seeds]
    model.to(DEVICE)
    gpu = [logits_and_gradients(model, *batch(seed=seed)) for seed in seeds]
    model.to("cpu").double().load_state_dict(exact)
    model.set_class_names(NAMES)
    truth = [logits_and_gradients(model, *batch(4, torch.float64, "cpu", seed)) for seed in seeds]

    def median(found, name):
        pairs = zip(found, truth, strict=True)
        return median_of(
            ((one[name] - want[name]).abs().max() / want[name].abs().max()).item()
            for one, want in pairs
        )

    for name in truth[0]:
        assert median(gpu, name) <= 4 * median(cpu, name) + 1e-6, name


def test_a_model_made_on_the_gpu_stays_there():
    """The class tree, other classes, and the domain encoder; masks whose rows are aligned."""
    clip = clip_model().to(DEVICE)
    encoder = timm.create_model("test_vit", num_classes=0)
    model = small_model(QUIET, clip=clip, encoder=encoder).eval()
    model.set_class_names([*NAMES, "harbour"])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {t.device.type for t in tensors.values()} == {DEVICE}
    for tree in model.classes.trees:
        for dtype in (torch.float32, torch.bfloat16):
            mask = tree.mask(dtype)
            assert mask.dtype == dtype and mask.stride(0) % 8 == 0 and mask.stride(1) == 1
    x, _, _ = batch()
    got = model(x)
    assert got.device.type == DEVICE and got.shape == (4, len(NAMES) + 1)
    torch.testing.assert_close(got.cpu(), model.cpu()(x.cpu()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("names", [NAMES, [f"class {i} of {j}" for i in range(9) for j in "abc"]])
def test_one_tree_or_many(names):
    one = randomize(small_model(QUIET, names=names)).to(DEVICE).eval()
    x, f, _ = batch()
    want = one(x, f)
    one.config = replace(QUIET, class_chunk=2)
    one.set_class_names(names)
    assert len(one.classes.trees) > 1
    torch.testing.assert_close(one(x, f), want, rtol=1e-4, atol=1e-4)


def train_steps(model, dtype, steps, config=ADAMW):
    """Losses of steps on one batch, as fastadapt.gdpl.loop takes them."""
    x, f, labels = batch(8)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
            logits = model(x, f)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("frozen", [False, True], ids=["cast every step", "cast once"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_falls_under_autocast(dtype, frozen):
    model = small_model().to(DEVICE).train()
    if frozen:
        model.set_frozen_dtype(dtype)
    losses = torch.stack(train_steps(model, dtype, 60)).tolist()
    assert losses[-1] < 0.7 * losses[0], losses
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trained(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_fp32(dtype):
    model = small_model(QUIET).to(DEVICE).train()
    want = logits_and_gradients(model, *batch())
    model.set_frozen_dtype(dtype)
    with torch.autocast(DEVICE, dtype):
        got = logits_and_gradients(model, *batch())
    for name, values in want.items():
        error = (got[name] - values).norm() / values.norm().clamp_min(1e-12)
        assert error < 0.1, (name, error)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_training_step_never_waits_for_the_gpu(dtype, optimizer):
    config = GDPLTrainConfig(optimizer=optimizer)
    model = small_model().to(DEVICE).train()
    if dtype is not None:
        model.set_frozen_dtype(dtype)
    train_steps(model, dtype, 3, config)  # libraries load and workspaces are made
    torch.cuda.synchronize()
    x, f, labels = batch(8)
    made = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros((), device=DEVICE))  # its own tensors are copied to the GPU once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
                logits = model(x, f)
            loss = F.cross_entropy(logits.float(), labels)
            made.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(made)
            scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("half", [False, True])
def test_forward_and_backward_in_a_cuda_graph(half):
    model = small_model(QUIET).to(DEVICE).train()
    if half:
        model.set_frozen_dtype(torch.bfloat16)
    x, f, labels = batch()

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half, cache_enabled=False):
            logits = model(x, f)
        F.cross_entropy(logits.float(), labels).backward()
        return logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(batch(4)[0].flip(0))
    f.copy_(batch(4)[1].flip(0))
    graph.replay()
    got = {name: p.grad.clone() for name, p in trained(model).items()}
    logits = captured.clone()
    model.zero_grad(set_to_none=True)
    loose = 0.05 if half else 1e-3  # captured products may be computed in another order
    torch.testing.assert_close(logits, step(), rtol=loose, atol=loose)
    for name, p in trained(model).items():
        assert (got[name] - p.grad).norm() <= loose * p.grad.norm() + 1e-6, name


@pytest.mark.parametrize("half", [False, True])
def test_checkpointed_steps_in_a_cuda_graph(half):
    """The same loss as of steps that keep everything, captured and eager; less memory."""
    said, losses, peaks = [], [], []
    for graph, less in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = randomize(small_model(QUIET)).to(DEVICE).train()
        if half:
            model.set_frozen_dtype(torch.bfloat16)
        model.set_grad_checkpointing(less)
        step = training_step(
            model,
            make_optimizer(model, ADAMW),
            lambda: torch.autocast(DEVICE, torch.bfloat16, enabled=half),
            graph=graph,
            say=said.append,
        )
        x, f, labels = batch(64)
        step(1e-3, labels, x, f)  # the optimizer has its state from here on
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses += [step(1e-3, labels, x, f)[0] for _ in range(WARMUP + 2)][-1:]
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert not said
    assert peaks[2] < peaks[1]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=5e-2 if half else 1e-3, atol=1e-3)


@pytest.mark.parametrize("half", [False, True])
def test_inference_as_cuda_graphs(half):
    """Of the folded model, with other classes in another graph; and of CLIP alone."""
    model = randomize(small_model(QUIET)).to(DEVICE).eval()
    folded = fa.fold(model)
    if half:
        model.bfloat16(), folded.bfloat16()
    loose = 0.05 if half else 1e-3  # captured products may be computed in another order
    for names in (NAMES, ["harbour", "sea"]):
        model.set_class_names(names), folded.set_class_names(names)
        said = []
        predict = fa.GraphedCall(folded, say=said.append)
        alone = fa.GraphedCall(model.zero_shot, say=said.append)
        for count in (4, 1, 4, 1):
            x, f, _ = batch(count, torch.bfloat16 if half else torch.float32)
            x, f = x + torch.rand_like(x), f + torch.rand_like(f)
            got, own = predict(x, f), alone(x)
            with torch.inference_mode():
                want, clip = folded(x, f), model.zero_shot(x)
            assert got.shape == (count, len(names))
            torch.testing.assert_close(got, want, rtol=loose, atol=loose)
            torch.testing.assert_close(own, clip, rtol=loose, atol=loose)
        assert not said and predict.captured == alone.captured == 2


def test_the_token_embedding_may_stay_on_the_cpu():
    model = randomize(small_model(QUIET)).to(DEVICE).eval().set_class_names(NAMES)
    x, f, _ = batch()
    want, clip = model(x, f), model.zero_shot(x)
    model.offload_token_embedding().set_class_names(NAMES)
    assert model.clip.token_embedding.weight.device.type == "cpu"
    torch.testing.assert_close(model(x, f), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.zero_shot(x), clip, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fa.fold(model)(x, f), want, rtol=1e-4, atol=1e-4)
    model.set_frozen_dtype(torch.bfloat16)
    assert model.clip.token_embedding.weight.device.type == "cpu"
    assert model.to(DEVICE).clip.token_embedding.weight.device.type == DEVICE


@pytest.mark.parametrize("half", [False, True])
def test_compiles_whole(half):
    """Twice as far from fp32 as eager calls in the same precision, at most, by medians."""
    torch.manual_seed(0)
    model = randomize(small_model(QUIET)).to(DEVICE).train()  # else some gradients are zero
    batches = [batch(seed=seed) for seed in range(1, 26)]
    exact = [logits_and_gradients(model, *given) for given in batches]
    if half:
        model.set_frozen_dtype(torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        eager = [logits_and_gradients(model, *given) for given in batches]
        model.forward = torch.compile(model.forward, fullgraph=True)
        compiled = [logits_and_gradients(model, *given) for given in batches]

    def median(found, name):
        pairs = zip(found, exact, strict=True)
        return median_of(
            ((one[name] - want[name]).norm() / want[name].norm()).item() for one, want in pairs
        )

    for name in exact[0]:
        assert median(compiled, name) <= 2 * median(eager, name) + 1e-3, name


def test_the_kernels_of_the_prompt_networks(monkeypatch):
    """Triton's quaternion layers in the model, beside their reference."""
    model = randomize(small_model(QUIET)).to(DEVICE).train()
    want = logits_and_gradients(model, *batch())
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    try:
        got = logits_and_gradients(model, *batch())
    except fa.kernels.BackendError as error:
        pytest.skip(str(error))
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gdpl")
    names = ("annual_crop", "forest", "harbour", "industrial_area", "river")
    return save_source(folder / "clip"), make_colours(folder / "data", names), folder


@pytest.mark.parametrize("amp", ["auto", "fp16", "off"])
@pytest.mark.parametrize("augment", ["crops", "none"])
def test_a_run(places, tmp_path, amp, augment):
    """Training, evaluation and the checkpoint, which belongs to the weights in fp32."""
    source, data, _ = places
    config = GDPLTrainConfig(
        shots=3, epochs=6, lr=5e-3, optimizer="adamw", amp=amp, augment=augment, val_fraction=0.4
    )
    gdpl = GDPLConfig(depth=2, rank=2, rank_depth=2)
    results = train_gdpl(data, tmp_path / "run", source, config, gdpl, device=DEVICE)
    run = results["seeds"]["1"]
    assert run["last_loss"] < run["first_loss"]
    model = load_gdpl(tmp_path / "run")  # checks the fingerprints of the frozen weights
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
