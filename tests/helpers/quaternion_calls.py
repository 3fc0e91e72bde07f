"""Arguments and checks that the tests of quaternion linear layers share."""

from __future__ import annotations

import random

import torch

from fastadapt.kernels import quaternion_linear, quaternion_linear_reference
from tests.helpers import kernel_checks
from tests.helpers.kernel_checks import beyond_pytorch

NAMES = ("y", "x", "weight_r", "weight_i", "weight_j", "weight_k", "bias", "scale")


def make(m, i, o, dtype, device="cpu", *, groups=None, form="hamilton", zero_half=False):
    """Arguments of ``quaternion_linear``, with bias and scale, and a gradient of its output."""
    leading = () if groups is None else (groups,)

    def normal(*shape, factor=1.0):
        return (torch.randn(*leading, *shape, device=device) * factor).to(dtype)

    x = normal(m, (2 if zero_half else 4) * i)
    w = [normal(i, o, factor=(4 * i) ** -0.5) for _ in range(4)]
    scale = normal(i, o) if form == "scaled rotation" else None
    kwargs = {"rotation": form != "hamilton", "zero_half": zero_half}
    return [x, *w, normal(4 * o), scale], normal(m, 4 * o), kwargs


def call(function, args, kwargs):
    return function(*args[:6], scale=args[6], **kwargs)


def with_triton(*args, **kwargs):
    return quaternion_linear(*args, backend="triton", **kwargs)


def output_and_gradients(function, args, g, kwargs, dtype=None):
    return kernel_checks.output_and_gradients(
        lambda *leaves: call(function, leaves, kwargs), args, g, dtype
    )


def errors_beyond_pytorch(args, g, kwargs, function=with_triton):
    """Where output or gradients have more than twice PyTorch's error in the same dtype."""

    def few(name, exact):  # or few different ones
        count = exact.numel()
        return count < 1000 or exact.flatten()[:: count // 1000].unique().numel() < 500

    truth = output_and_gradients(quaternion_linear_reference, args, g, kwargs, torch.float64)
    reference = output_and_gradients(quaternion_linear_reference, args, g, kwargs)
    ours = output_and_gradients(function, args, g, kwargs)
    names = [n for n, t in zip(NAMES, ["y", *args], strict=True) if t is not None]
    return beyond_pytorch(names, ours, reference, truth, args[0].dtype, few=few)


def random_case(case, device="cuda", *, small=False):
    """One call with random sizes, dtypes, strides; returns what is wrong with it.

    Args:
        case: the seed.
        device: where.
        small: few numbers, no bf16: for the interpreter, where its products are wrong.
    """
    torch.manual_seed(case)
    choose = random.Random(case)
    dtype = choose.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    sizes = [1, 3, 16, 30, 63, 64, 96, 128, 192, 250, 256, 320, 512, 1024]
    i, o = choose.choice(sizes), choose.choice(sizes)
    form = choose.choice(["hamilton", "hamilton", "hamilton", "rotation", "scaled rotation"])
    zero_half = choose.random() < 0.4
    groups = choose.choice([None, None, None, 1, 2, 8])
    m = choose.choice([1, 2, 7, 8, 16, 17, 33, 64, 100, 256, 511, 513, 640, 1000, 3000])
    if case % 4:
        m = min(m, 256)
    if small:
        dtype = torch.float16 if dtype is torch.bfloat16 else dtype
        m, i, o = min(m, 70), min(i, 40), min(o, 40)
    args, g, kwargs = make(m, i, o, dtype, device, groups=groups, form=form, zero_half=zero_half)
    kind = choose.choice(["plain", "plain", "sliced", "transposed", "expanded", "odd"])
    x, leading = args[0], () if groups is None else (groups,)
    if kind == "sliced":
        args[0] = torch.cat([x, x], -1)[..., x.shape[-1] :]
        g = torch.cat([g, g], -2)[..., m:, :]
    elif kind == "transposed":
        args[0] = x.mT.contiguous().mT
        args[2] = args[2].mT.contiguous().mT
        g = g.mT.contiguous().mT
    elif kind == "expanded":
        g = g[..., :1, :].expand(*leading, m, 4 * o)
    elif kind == "odd":  # more dimensions, addresses that are not aligned
        x = torch.cat([x.flatten(), x.flatten()[:1]])[1:].view_as(x)
        args[0] = x.unsqueeze(-2).expand(*x.shape[:-1], 2, x.shape[-1])
        g = g.unsqueeze(-2).expand(*g.shape[:-1], 2, g.shape[-1])
    if case % 7 == 0:
        args[5] = None
    found = errors_beyond_pytorch(args, g, kwargs)
    if found:
        found.insert(0, f"case {case}: {m, i, o, groups, dtype, kind, kwargs}")
    return found
