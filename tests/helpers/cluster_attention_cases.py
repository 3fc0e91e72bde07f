"""Cases of cluster attention, and what its tests compare with."""

from __future__ import annotations

import contextlib
import random

import torch
import torch.nn.functional as F

from fastadapt.kernels import center_attention, cluster_attention, cluster_attention_reference
from tests.helpers.kernel_checks import FEW, beyond_pytorch, output_and_gradients

NAMES = ("y", "x", "centers", "transforms", "down_weight", "down_bias", "up_weight", "up_bias")


def make(b, n, c, r, k, dtype, device="cpu", token=False, params=None):
    """Arguments of cluster_attention and a gradient of its output."""
    params = params or dtype

    def normal(*shape, scale=1.0, dtype=params):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    # A shared offset, so that mean tokens differ from noise.
    x = (torch.randn(b, n, c, device=device) + torch.randn(1, 1, c, device=device)).to(dtype)
    args = [x, normal(c, k), normal(k, *((n, n) if token else (r, r)))]
    if not token:
        args += [normal(r, c, scale=c**-0.5), normal(r), normal(c, r, scale=r**-0.5), normal(c)]
    return args, normal(b, n, c, dtype=dtype)


def assert_as_exact_as_pytorch(args, g, function=None):
    """Output and gradients within twice PyTorch's error in the same dtype, against fp64."""
    wrong = errors_beyond_pytorch(args, g, function)
    assert not wrong, ", ".join(wrong)


def errors_beyond_pytorch(args, g, function=None):
    """Results with more than twice PyTorch's error in the same dtype, against fp64.

    The centers' gradient is made of B·K numbers, the gradient of the scores before the softmax:

        (1)  da[b, k] = sum over i, j of dT[b, i, j] · transforms[k, i, j]
        (2)  ds[b, k] = a[b, k] · (da[b, k] − sum over j of a[b, j] · da[b, j])

    Both sums may nearly cancel. Where the numbers are few, 2 eps more are allowed in proportion to
    the terms of (1) instead of ds (:func:`cancellation`).
    """
    function = function or (lambda *a: cluster_attention(*a, backend="triton"))
    truth = output_and_gradients(cluster_attention_reference, args, g, torch.float64)
    reference = output_and_gradients(cluster_attention_reference, args, g)
    ours = output_and_gradients(function, args, g)
    names = [n for n, t in zip(NAMES, ["y", *args], strict=False) if t is not None]

    def few(name, exact):  # the centers' gradient hangs on B·K values
        values = args[0].shape[0] * args[1].shape[1] if name == "centers" else exact.numel()
        return values < FEW

    cancels = {}
    if few("centers", args[1]):
        cancels["centers"] = cancellation(args, g)
    return beyond_pytorch(
        names, ours, reference, truth, args[0].dtype, few=few, cancellation=cancels
    )


def cancellation(args, g):
    """Norm of the terms of a · da by the norm of the scores' gradient ds; in fp64."""
    x, centers, transforms, *others = [None if t is None else t.detach().double() for t in args]
    a = center_attention(x, centers)
    flat = transforms.flatten(1)
    mixed = (a @ flat).view(-1, *transforms.shape[1:]).requires_grad_()
    if others:
        down_weight, down_bias, up_weight, up_bias = others
        y = F.linear(F.linear(x, down_weight, down_bias) @ mixed, up_weight, up_bias)
    else:
        y = mixed @ x
    (d_mixed,) = torch.autograd.grad(y, mixed, g.double())
    d_mixed = d_mixed.flatten(1)
    da = d_mixed @ flat.t()
    ds = a * (da - (a * da).sum(1, keepdim=True))
    terms = a * (d_mixed.square() @ flat.square().t()).sqrt()
    return float(terms.norm() / ds.norm().clamp_min(1e-300))


def random_case(case, device="cuda", *, hopper=False, small=False):
    """One call with random sizes, dtypes and strides; returns what is wrong with it.

    Args:
        case: the seed.
        device: where.
        hopper: sizes that Hopper's own kernels take, with one to three groups.
        small: few numbers, no bf16: for the interpreter, where its products are wrong.
    """
    torch.manual_seed(case)
    choose = random.Random(case)
    dtype = choose.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    c = choose.choice([16, 63, 96, 192, 384, 768, 1000, 1024])
    r = choose.choice([16, 60, 64, 96, 128, 256, 256, 256, 300, 512])
    k = choose.choice([1, 3, 20, 33, 64, 128])
    n = choose.choice([1, 3, 17, 49, 64, 100, 196, 197, 256, 777])
    forced = contextlib.nullcontext()
    if hopper:
        from fastadapt.kernels.cluster_attention.block_sizes import force_groups

        dtype = choose.choice([torch.bfloat16, torch.float16])
        r = choose.choice([64, 128, 256])
        n = choose.choice([5, 9, 17, 49, 64, 100, 196, 197, 256, 777])
        forced = force_groups(choose.choice([1, 2, 3]), aligned=case % 2 == 0)
    b = choose.randint(1, max(1, 20_000 // n if case % 4 == 0 else 2_000 // n))
    b = min(b, 2**28 // (r * r))  # T_b of every sample in fp64: 2 GiB
    if small:
        dtype = torch.float16 if dtype is torch.bfloat16 else dtype
        b, n, c, r, k = min(b, 3), min(n, 20), min(c, 70), min(r, 60), min(k, 20)
    token = not hopper and case % 10 == 0 and n <= 256
    args, g = make(b, n, c, r, k, dtype, device, token=token)
    kind = choose.choice(["plain", "sliced", "transposed", "expanded"])
    if kind == "sliced":
        args[0] = torch.randn(b, n + 1, c, device=device).to(dtype)[:, 1:]
    elif kind == "transposed":
        args[0] = torch.randn(b, c, n, device=device).to(dtype).transpose(1, 2)
        g = torch.randn(n, b, c, device=device).to(dtype).transpose(0, 1)
    elif kind == "expanded":
        g = g[:, :1].expand(b, n, c)
    if not token and case % 7 == 0:
        args[4] = args[6] = None
    with forced:
        found = errors_beyond_pytorch(args, g)
    if found:
        found.insert(0, f"case {case}: {b, n, c, r, k, dtype, kind, token}")
    return found
