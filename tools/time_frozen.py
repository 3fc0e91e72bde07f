"""Time a frozen backbone's features on a GPU, beside torch.compile, with their errors.

    python -m tools.time_frozen FILE [vit_base_patch16_224:64 ...]
    python -m tools.time_frozen prepare vit_base_patch16_224:64 autocast|bf16

GPU time of one replay of a CUDA graph, in ms, and the error to features in fp32 (TF32 off): the
root of the mean square relative to theirs, and the largest relative to their spread. Weights are
random; layer scales are 0.3, since timm's initial 1e-6 would hide the blocks. ``prepare`` fills
PyTorch's caches with a rival's code, in a process of its own.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.cuda_graph import collect_before_replays
from fastadapt.files import write_json
from fastadapt.fusion.frozen_blocks import fused_blocks, release_fused_blocks
from fastadapt.info import versions

BF16 = torch.bfloat16
CASES = [
    *(f"vit_base_patch16_224:{batch}" for batch in (8, 64, 256)),
    *(f"convnext_base:{batch}" for batch in (8, 64, 256)),
]

Call = Callable[[Tensor], Tensor]


def make(name: str) -> Any:
    """Make a frozen backbone with random weights of all kinds."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).cuda().eval().requires_grad_(False)
    for key, p in model.named_parameters():
        if key.endswith("gamma"):
            p.fill_(0.3)
        elif p.dim() == 1:
            p.add_(0.05 * torch.randn_like(p))
    return model.to(memory_format=torch.channels_last)


def make_images(batch: int) -> Tensor:
    """Draw images [batch, 3, 224, 224]."""
    torch.manual_seed(1)
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    return images.to(memory_format=torch.channels_last)


def under_autocast(model: Any) -> Call:
    """Return timm's features under autocast."""

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cuda", BF16):
            return model.forward_features(x)

    return call


def fused(model: Any) -> Call:
    """Return the features as training computes them."""

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cuda", BF16), fused_blocks(model, x):
            return model.forward_features(x)

    return call


def compiled(model: nn.Module, kind: str) -> Call:
    """Return the features through torch.compile, ``"autocast"`` or of a copy in ``"bf16"``."""
    if kind == "autocast":
        return torch.compile(under_autocast(model), dynamic=False)
    half: Any = copy.deepcopy(model).to(BF16)
    return torch.compile(lambda x: half.forward_features(x.to(BF16)), dynamic=False)


@torch.no_grad()
def measure(call: Call, x: Tensor) -> tuple[float, Tensor]:
    """Return the median time of a replay in ms, and the features in fp32."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            y = call(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with collect_before_replays([]), torch.cuda.graph(graph):
        y = call(x)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 8 or (time.perf_counter() - began < 0.5 and len(times) < 100):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:]), y.float().clone()


def run(name: str, batch: int) -> dict[str, dict[str, float]]:
    """Time all ways to compute the features of one backbone and batch."""
    model, x = make(name), make_images(batch)
    with torch.no_grad():
        exact = torch.cat([model.forward_features(part) for part in x.split(64)]).float()
    torch.compiler.reset()
    ways = {
        "timm, autocast": under_autocast(model),
        "compiled, autocast": compiled(model, "autocast"),
        "compiled, bf16 weights": compiled(model, "bf16"),
        "fastadapt": fused(model),
    }
    found = {}
    for way, call in ways.items():
        ms, y = measure(call, x)
        y -= exact
        found[way] = {
            "ms": round(ms, 3),
            "error": float(f"{(y.norm() / exact.norm()).item():.2e}"),
            "largest": float(f"{(y.abs().max() / exact.std()).item():.2e}"),
        }
        del y
        torch.cuda.empty_cache()
        print(f"{name:22} {batch:4} {way:24} {found[way]}", flush=True)
    release_fused_blocks(model)
    return found


def main(arguments: list[str]) -> None:
    """Time, or prepare one rival."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if arguments[0] == "prepare":
        name, batch = arguments[1].split(":")
        with torch.no_grad():
            compiled(make(name), arguments[2])(make_images(int(batch)))
        torch.cuda.synchronize()
        return
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: versions().get(name) for name in ("torch", "triton", "timm")},
        "command": "python -m tools.time_frozen FILE",
        "features": {},
    }
    for case in arguments[1:] or CASES:
        name, batch = case.split(":")
        results["features"][case] = run(name, int(batch))
        write_json(Path(arguments[0]), results)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
