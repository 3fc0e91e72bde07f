"""Layers on a second GPU, and spread over two."""

import copy

import pytest
import torch
import torch.distributed.fsdp

import fastadapt as fa
from fastadapt.bench.harness import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def gradients(model, x):
    """The output, and the gradients of every parameter and of x."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.exp().sum().backward()  # norms of what LayerNorm gives are constant
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_close(found, exact, limit):
    for index, (mine, truth) in enumerate(zip(found, exact, strict=True)):
        assert relative_error(mine.cpu().double(), truth.cpu().double()) < limit, index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_on_the_second_gpu(dtype):
    exact = fa.CLAdapter(768).double()
    x = torch.randn(16, 196, 768)
    truth = gradients(exact, x.double())
    found = {}
    # What was compiled for one GPU serves the other, in turn.
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        model = copy.deepcopy(exact).to(device, dtype)
        found[device] = gradients(model, x.to(device, dtype))
        assert torch.cuda.current_device() == 0
        assert {str(t.device) for t in found[device]} == {device}
        assert_close(found[device][:1], truth[:1], 0.02 if dtype == torch.bfloat16 else 1e-3)
    assert_close(found["cuda:1"], found["cuda:0"], 1e-3)


def _train(rank, wrap, store, x, model, results):
    """One of two processes, each with half of the batch."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=2
    )
    model = model.to(rank)
    if wrap == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
    else:
        for block in model.blocks:
            torch.distributed.fsdp.fully_shard(block)
        wrapped = torch.distributed.fsdp.fully_shard(model)
    wrapped(x.chunk(2)[rank].to(rank)).exp().sum().backward()
    grads = [p.grad if wrap == "ddp" else p.grad.full_tensor() for p in model.parameters()]
    if rank == 0:
        torch.save([g.cpu() for g in grads], results)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_training_on_two_gpus(wrap, tmp_path):
    model = fa.CLAdapter(192, num_centers=5, rank=64)
    x = torch.randn(8, 49, 192)
    arguments = (wrap, tmp_path / "store", x, model, tmp_path / "grads.pt")
    torch.multiprocessing.spawn(_train, arguments, nprocs=2)
    _, _, *expected = gradients(model.double(), x.double())
    # Both average over the processes.
    found = [2 * g for g in torch.load(tmp_path / "grads.pt", weights_only=True)]
    assert_close(found, expected, 1e-3)
