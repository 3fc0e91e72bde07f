"""Cluster attention: our kernels, the best formulation in PyTorch, and upstream's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastadapt.bench import harness
from fastadapt.kernels import cluster_attention, cluster_attention_reference

# Batch, tokens, channels; first target and ambition, forward and backward, in µs on an H100.
SHAPES = {
    (128, 196, 768): ((70, 58), (165, 140)),
    (64, 256, 1024): ((54, 47), (130, 110)),
    (32, 196, 768): ((33, 25), None),
    (256, 49, 1280): ((80, 65), None),
    (1, 196, 768): ((16, 10), None),
}
CENTERS, RANK = 20, 256
DTYPE = torch.bfloat16


def make_inputs(
    batch: int, tokens: int, width: int, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Arguments of ``cluster_attention`` that require gradients, and a gradient of its output."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device="cuda") * scale
        return values.to(DTYPE).requires_grad_()

    return [
        normal(batch, tokens, width),
        normal(width, CENTERS),
        normal(CENTERS, RANK, RANK),
        normal(RANK, width, scale=width**-0.5),
        normal(RANK),
        normal(width, RANK, scale=RANK**-0.5),
        normal(width),
    ], normal(batch, tokens, width).detach()


def upstream_formulation(x, centers, transforms, down_weight, down_bias, up_weight, up_bias):
    """The operation in upstream's steps, with its [B, K, R, R]."""
    batch = x.shape[0]
    q = F.normalize(x.mean(dim=1), dim=-1)
    a = (q @ F.normalize(centers, dim=0)).softmax(dim=-1)
    spread = transforms.unsqueeze(0).expand(batch, -1, -1, -1)
    mixed = (a[:, :, None, None] * spread).sum(dim=1)
    h = F.linear(x, down_weight, down_bias)
    return F.linear(h @ mixed, up_weight, up_bias)


def run(quick: bool = False) -> dict:
    """Times every shape; see :func:`fastadapt.bench.run`."""
    ours = _with_backend_triton
    forward, backward, eager, wrong = [], [], [], []
    for shape, (forward_target, backward_target) in SHAPES.items():
        if quick and shape[0] not in (1, 128):
            continue
        name = " × ".join(map(str, shape))
        torch.compiler.reset()  # each shape starts without a history of recompilations
        compiled = torch.compile(cluster_attention_reference, dynamic=False)
        errors = _errors(ours, shape)
        if not all(value <= 2 * limit + 1e-7 for value, limit in errors.values()):
            wrong.append({"B × N × C": name, **{k: f"{a:.1e}" for k, (a, _) in errors.items()}})
            continue
        sets = harness.input_sets(2 * shape[0] * shape[1] * shape[2])
        inputs = [make_inputs(*shape, seed=seed) for seed in range(sets)]
        floors = _floors(*shape)
        times = {
            key: _times(function, inputs)
            for key, function in (("ours", ours), ("compiled", compiled), ("eager", _reference))
        }
        forward.append(_row(name, {k: t[0] for k, t in times.items()}, floors[0], forward_target))
        backward.append(_row(name, {k: t[1] for k, t in times.items()}, floors[1], backward_target))
        eager.append(_eager_row(name, inputs[0], ours, compiled))
        del inputs
    tables = {
        "forward, GPU µs (CUDA graph)": forward,
        "backward, all gradients, GPU µs (CUDA graph)": backward,
        "eager calls, forward + backward: wall time in µs, peak memory in MiB": eager,
    }
    if wrong:
        tables = {"WRONG RESULTS, not timed": wrong, **tables}
    return {"tables": {k: v for k, v in tables.items() if v}, "wrong": wrong}


def _with_backend_triton(*args):
    return cluster_attention(*args, backend="triton")


def _reference(*args):
    return cluster_attention_reference(*args)


def _errors(function, shape) -> dict[str, tuple[float, float]]:
    """Error of output and gradients against fp64, beside PyTorch's in the same dtype."""
    args, g = make_inputs(*shape)

    def results(f, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in args]
        y = f(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype))]

    truth = results(cluster_attention_reference, torch.float64)
    mine, reference = results(function, DTYPE), results(cluster_attention_reference, DTYPE)
    names = ("y", "dx", "dcenters", "dtransforms", "ddown", "ddown_bias", "dup", "dup_bias")
    return {
        name: (harness.relative_error(m, t), harness.relative_error(r, t))
        for name, m, r, t in zip(names, mine, reference, truth, strict=True)
    }


def _times(function, inputs) -> tuple[float, float]:
    """Forward, and backward as the difference to both together."""

    def forward(args):
        with torch.no_grad():
            return function(*args)

    def both(args, g):
        return torch.autograd.grad(function(*args), args, g)

    forward_time = harness.graph_time([lambda a=a: forward(a) for a, _ in inputs])
    both_time = harness.graph_time([lambda a=a, g=g: both(a, g) for a, g in inputs], repeats=2)
    return forward_time, both_time - forward_time


def _floors(batch: int, tokens: int, width: int) -> tuple[float, float]:
    rows = batch * tokens
    project = 2 * rows * width * RANK
    mix = 2 * rows * RANK * RANK
    x_bytes = 2 * rows * width
    return (
        harness.floor(2 * project + mix, 2 * x_bytes),
        harness.floor(4 * project + 3 * mix, 4 * x_bytes),
    )


def _row(name, times, floor, target) -> dict:
    row = {"B × N × C": name}
    row |= {provider: f"{value:.1f}" for provider, value in times.items()}
    row["compiled / ours"] = f"{times['compiled'] / times['ours']:.2f}×"
    row["floor"] = f"{floor:.1f}"
    row["of floor"] = f"{100 * floor / times['ours']:.0f} %"
    if target is None:
        return row | {"target": None, "met": None}
    met = "both" if times["ours"] <= target[1] else "first" if times["ours"] <= target[0] else "no"
    return row | {"target": f"{target[0]} / {target[1]}", "met": met}


def _eager_row(name, inputs, ours, compiled) -> dict:
    args, g = inputs
    row = {"B × N × C": name}
    functions = {
        "ours": ours,
        "eager": _reference,
        "compiled": compiled,
        "upstream": upstream_formulation,
    }

    def step(function):
        return lambda: torch.autograd.grad(function(*args), args, g)

    for provider, function in functions.items():
        row[f"{provider}, µs"] = f"{harness.wall_time(step(function), 20):.0f}"
    for provider, function in functions.items():
        row[f"{provider}, MiB"] = f"{harness.peak_memory(step(function)):.0f}"
    return row
