"""Cluster attention's kernels on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import BackendError, cluster_attention, cluster_attention_reference
from tests.helpers.cluster_attention_cases import (
    NAMES,
    assert_as_exact_as_pytorch,
    make,
    random_case,
)
from tests.helpers.kernel_checks import (
    FIRST_CASE,
    RANDOM_CASES,
    gpu,
    output_and_gradients,
)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("b", "n", "c", "r", "k"),
    [
        (128, 196, 768, 256, 20),
        (64, 256, 1024, 256, 20),
        (32, 196, 768, 256, 20),
        (256, 49, 1280, 256, 20),
        (1, 196, 768, 256, 20),
        (40, 197, 768, 128, 20),
        (64, 150, 384, 64, 3),
        (2, 8192, 96, 16, 128),
        (3, 63, 1000, 60, 7),
        (2, 100, 4096, 512, 20),
        (64, 1, 256, 96, 1),
        (300, 7, 768, 256, 20),
    ],
)
def test_gpu_channel_mode(b, n, c, r, k, dtype):
    assert_as_exact_as_pytorch(*make(b, n, c, r, k, dtype, "cuda"))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [49, 196])
def test_gpu_token_mode(n, dtype):
    assert_as_exact_as_pytorch(*make(16, n, 768, None, 20, dtype, "cuda", token=True))


@gpu
@pytest.mark.parametrize("which", ["all", "hopper"])
def test_gpu_random(which):
    """FASTADAPT_RANDOM_CASES calls with random sizes, dtypes and strides.

    With "hopper" those that Hopper's own kernels take, with one to three groups at any size.
    """
    if which == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    wrong = []
    for case in range(FIRST_CASE, FIRST_CASE + RANDOM_CASES):
        found = random_case(case, hopper=which == "hopper")
        if found:
            wrong.append(", ".join(found))
            print(wrong[-1], flush=True)
        print(f"case {case} done", flush=True)
    assert not wrong, "\n".join(wrong)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_autocast_with_fp32_parameters(dtype):
    args, g = make(8, 100, 384, 128, 20, torch.float32, "cuda")

    def run(function):
        with torch.autocast("cuda", dtype):
            return output_and_gradients(function, args, g)

    truth = output_and_gradients(cluster_attention_reference, args, g, torch.float64)
    reference = run(cluster_attention_reference)
    ours = run(lambda *a: cluster_attention(*a, backend="triton"))
    for name, mine, theirs, exact in zip(NAMES, ours, reference, truth, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert relative_error(mine, exact) <= 2 * relative_error(theirs, exact) + 1e-7, name


@gpu
@pytest.mark.parametrize("token", [False, True])
def test_gpu_opcheck(token):
    args, _ = make(4, 49, 96, 64, 3, torch.bfloat16, "cuda", token=token)
    args = [t.requires_grad_() for t in args] + [None] * (7 - len(args))
    torch.library.opcheck(torch.ops.fastadapt.cluster_attention.default, (*args, True))


@gpu
def test_gpu_compiles_whole(monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    args, g = make(8, 100, 384, 128, 20, torch.bfloat16, "cuda")
    compiled = torch.compile(lambda *a: cluster_attention(*a) * 2, fullgraph=True)
    assert_as_exact_as_pytorch(args, g, lambda *a: compiled(*a) / 2)


@gpu
def test_gpu_exports(monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")

    class Module(torch.nn.Module):
        def forward(self, *args):
            return cluster_attention(*args)

    args, _ = make(4, 49, 96, 64, 3, torch.bfloat16, "cuda")
    program = torch.export.export(Module(), tuple(args))
    assert "fastadapt.cluster_attention" in str(program.graph)
    torch.testing.assert_close(program.module()(*args), cluster_attention(*args))


FIRST_CALL = """
import time
import torch
from fastadapt.kernels import cluster_attention
torch.manual_seed(0)
shapes = (128, 196, 768), (768, 20), (20, 256, 256), (256, 768), (256,), (768, 256), (768,)
args = [(0.1 * torch.randn(s, device="cuda")).bfloat16().requires_grad_() for s in shapes]
g = torch.randn_like(args[0])
results = []
for _ in range(2):
    times = [time.perf_counter()]
    y = cluster_attention(*args, backend="triton")
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    results.append((y, *torch.autograd.grad(y, args, g)))
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    print(f"forward {times[1] - times[0]:.2f} s, backward {times[2] - times[1]:.2f} s")
assert all(map(torch.equal, *results))
"""


@gpu
def test_gpu_first_call(tmp_path):
    """Prints its seconds, compiled and then from Triton's cache, each before a second call's."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    for kernels in ("compiled", "from the cache"):
        command = [sys.executable, "-c", FIRST_CALL]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        print(kernels, done.stdout, sep="\n")


@gpu
def test_gpu_is_deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        args, g = make(64, 196, 768, 256, 20, torch.bfloat16, "cuda")
        function = lambda *a: cluster_attention(*a, backend="triton")  # noqa: E731
        first = output_and_gradients(function, args, g)
        for again, before in zip(output_and_gradients(function, args, g), first, strict=True):
            assert torch.equal(again, before)
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
def test_gpu_checkpoint_and_cuda_graph(monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    from torch.utils.checkpoint import checkpoint

    args, g = make(32, 196, 768, 256, 20, torch.bfloat16, "cuda")
    assert_as_exact_as_pytorch(
        args, g, lambda *a: checkpoint(cluster_attention, *a, use_reentrant=False)
    )
    expected = cluster_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cluster_attention(*args)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@gpu
@pytest.mark.parametrize(
    ("b", "n", "c", "r"),
    [(32, 196, 768, 256), (300, 49, 384, 256), (1, 196, 768, 256), (40, 197, 200, 60)],
)
def test_gpu_backward_in_a_cuda_graph(b, n, c, r):
    """There the weights' gradients are a branch; replays follow one another without a pause."""
    args, g = make(b, n, c, r, 20, torch.bfloat16, "cuda")
    static = [t.clone() for t in (*args, g)]

    def run(leaves, g):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = cluster_attention(*leaves, backend="triton")
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static[:-1], static[-1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static[:-1], static[-1])
    for turn in range(3):
        args, g = make(b, n, c, r, 20, torch.bfloat16, "cuda")
        for t, value in zip(static, (*args, g), strict=True):
            t.copy_(value)
        for _ in range(3):
            graph.replay()
        for name, mine, eager in zip(NAMES, captured, run(args, g), strict=True):
            assert relative_error(mine, eager.double()) < 5e-3, (turn, name)


@gpu
def test_gpu_compiles_to_cuda_graphs(monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    args, g = make(8, 100, 384, 128, 20, torch.bfloat16, "cuda")
    compiled = torch.compile(cluster_attention, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert_as_exact_as_pytorch(args, g, compiled)


@gpu
def test_gpu_calls_with_other_tensors_in_between():
    """Launches are repeated by address: here sizes, memory, alignment, dtypes, streams change."""
    other = torch.cuda.Stream()
    for turn in range(4):
        for b, n, c, r, k, dtype in (
            (1, 196, 768, 256, 20, torch.bfloat16),
            (3, 63, 60, 60, 7, torch.float16),
            (1, 196, 768, 256, 20, torch.float16),
            (32, 196, 768, 256, 20, torch.bfloat16),
            (4, 49, 96, 64, 3, torch.float32),
        ):
            args, g = make(b, n, c, r, k, dtype, "cuda")
            if turn % 2:  # x and a bias begin 2 or 4 bytes after a multiple of 16
                for i in (0, 4):
                    storage = args[i].new_empty(args[i].numel() + 1)
                    args[i] = storage[1:].view(args[i].shape).copy_(args[i])
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other if turn >= 2 else torch.cuda.current_stream()):
                assert_as_exact_as_pytorch(args, g)
            torch.cuda.synchronize()


@gpu
def test_gpu_launch_hooks_hear_of_every_launch():
    from triton import knobs

    args, _ = make(1, 196, 768, 256, 20, torch.bfloat16, "cuda")
    expected = [cluster_attention(*args, backend="triton") for _ in range(3)]
    names = []
    hear = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hear)
    try:
        y = cluster_attention(*args, backend="triton")
    finally:
        knobs.runtime.launch_enter_hook.remove(hear)
    assert names == ["project_kernel", "attend_kernel", "mix_kernel", "transform_kernel"]
    assert torch.equal(y, expected[0])


@gpu
def test_gpu_parameters_on_another_device_are_named():
    args, _ = make(2, 49, 96, 64, 3, torch.bfloat16, "cuda")
    args[1] = args[1].cpu()
    with pytest.raises(ValueError, match="cpu; expected cuda"):
        cluster_attention(*args, backend="triton")


@gpu
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_gpu_distributed(wrap, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    from fastadapt.layers import ClusterAttention

    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        layer = ClusterAttention(96, 5, 64).to("cuda")
        x = torch.randn(4, 49, 96, device="cuda")
        layer(x).sum().backward()
        expected = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        if wrap == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(layer, device_ids=[0])
        else:
            wrapped = torch.distributed.fsdp.fully_shard(layer)
        wrapped(x).sum().backward()
        for p, gradient in zip(layer.parameters(), expected, strict=True):
            mine = p.grad.full_tensor() if wrap == "fsdp2" else p.grad
            torch.testing.assert_close(mine, gradient)
    finally:
        torch.distributed.destroy_process_group()


@gpu
def test_gpu_empty_batch_and_uncovered_sizes():
    args, _ = make(1, 5, 32, 16, 3, torch.bfloat16, "cuda")
    args[0] = args[0][:0]
    assert cluster_attention(*args).shape == (0, 5, 32)
    with pytest.raises(BackendError, match="empty"):
        cluster_attention(*args, backend="triton")
    args, _ = make(2, 5, 32, 16, 129, torch.bfloat16, "cuda")
    assert cluster_attention(*args).shape == (2, 5, 32)
    with pytest.raises(BackendError, match="129 centers"):
        cluster_attention(*args, backend="triton")


@gpu
def test_gpu_more_than_two_to_the_31_elements():
    b, n, c = 700, 4096, 768  # 2.2e9
    args, _ = make(2, n, c, 256, 20, torch.bfloat16, "cuda")
    x = args[0][:1].expand(b, n, c).contiguous()
    x[-1] = args[0][1]
    y = cluster_attention(x, *args[1:], backend="triton")
    expected = cluster_attention(*args, backend="triton")
    # Rows meet other tiles here, and other orders of adding.
    torch.testing.assert_close(y[0], expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y[-1], expected[1], rtol=2e-2, atol=2e-2)
    assert torch.equal(y[1], y[1]) and torch.isfinite(y[b // 2]).all()
