"""Time training steps, stage 1 on images and on cached features, and stage 2, beside upstream's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.adapted_model import AdaptedModel
from fastadapt.fusion.frozen_blocks import release_fused_blocks
from fastadapt.train.config import TrainConfig
from fastadapt.train.feature_cache import as_tokens
from fastadapt.train.optimizer import make_optimizer
from fastadapt.train.sources import logits_of_cached
from fastadapt.train.step import training_step

from .. import harness
from .. import network_step as steps
from ..protocol import Benchmark, Errors, Record
from ..upstream import CLAdapterModel

TITLE = "Training step, CLAdapter after a frozen backbone (stage 1) or with it (stage 2)"
NOTES = (
    "Forward, loss, backward and optimizer, from a batch in the GPU's memory; wall time. Upstream "
    "is its recipe restated: eager calls, fp16 autocast with loss scaling, Adam, the backbone "
    "called within autograd's graph, the adapter with its [B, K, R, R]. Ours is what `fastadapt "
    "train` does: replays of a CUDA graph, the copy of the batch into it included, bf16 autocast, "
    "AdamW, no gradients for frozen features, kernels where they are the default; “ours, eager” is "
    "the same with `--cuda-graph off`, “compiled” the same with the frozen backbone through "
    "torch.compile. Cached means that the features of stage 1 are there already "
    "(upstream has no cache: its stage 1 stands beside it). Peak memory includes weights, "
    "optimizer and batch, and of a graph its capture."
)
# Backbone and batch; targets in µs on an H100: stage 1, cached.
SHAPES = {
    ("vit_base_patch16_224", 8): ((4500,), (600, 400)),
    ("vit_base_patch16_224", 64): ((9300,), (1000, 700)),
    ("vit_base_patch16_224", 256): ((33000,), (3500, 2800)),
    ("convnext_base", 64): ((18500,), (800,)),
}
CPU = {("test_vit", 2): ((), ()), ("test_convnext", 2): ((), ())}
CLASSES = 10


def run(quick: bool = False) -> Iterator[Record]:
    """Time every backbone and batch."""
    shapes = SHAPES if torch.cuda.is_available() else CPU
    for index, ((name, batch), targets) in enumerate(shapes.items()):
        if not quick or index == 0:
            yield record(name, batch, *targets)


def record(name: str, batch: int, first: tuple[float, ...], cached: tuple[float, ...]) -> Record:
    """Check one backbone and batch, then time it.

    Args:
        name: timm's.
        batch: images in a step.
        first: targets in µs of stage 1 on images.
        cached: targets in µs of stage 1 on cached features.
    """
    import timm

    torch.manual_seed(0)
    where = harness.device()
    backbone = timm.create_model(name, pretrained=False).to(where)
    model = fa.adapt(backbone, num_classes=CLASSES).train()
    upstream = CLAdapterModel(model)
    images = torch.randn(batch, *model.spec.input_size, device=where)
    labels = torch.randint(CLASSES, (batch,), device=where)
    result = Record(f"{name}, {batch}", "backbone, batch", batch)
    result.errors, result.wrong = _check(model, images, labels)
    if result.wrong:
        return result
    release_fused_blocks(backbone)  # what is kept of it is ours alone, and only where it is called

    def ours(logits: Callable[[Tensor], Tensor], inputs: Tensor) -> dict[str, steps.Step]:
        found = {"ours": steps.measure(_step(model, logits, labels, inputs, True), graph=True)}
        if where.type == "cuda":  # elsewhere it is the same
            found["ours, eager"] = steps.measure(_step(model, logits, labels, inputs, False))
        return found

    theirs = steps.measure(_upstream_step(model, upstream, labels, images))
    # As the trainer has it: convolutions read channels last, the cache holds fp16 tokens.
    model.to(memory_format=torch.channels_last)
    last = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), _autocast():
        features = model.backbone_features(last)
    shape, layout = features.shape, model.spec.layout
    features = as_tokens(model, features).to(torch.float16).contiguous()

    def from_cache(x: Tensor) -> Tensor:
        if layout == "channels_first":
            x = x.transpose(1, 2).view(shape)
        elif layout == "channels_last":
            x = x.view(shape)
        return logits_of_cached(model, x)

    parts = {"stage 1": {"upstream": theirs, **ours(model, last)}}
    release_fused_blocks(backbone)
    if where.type == "cuda":
        step = _step(model, _compiled(model), labels, last, True)
        parts["stage 1"]["compiled"] = steps.measure(step, graph=True)
        del step
        torch.compiler.reset()
    parts["cached"] = {"upstream": theirs, **ours(from_cache, features)}
    model.unfreeze()
    parts["stage 2"] = {
        **ours(model, last),
        "upstream": steps.measure(_upstream_step(model, upstream, labels, images)),
    }
    result.parts = {name: steps.part(found) for name, found in parts.items()}
    result.parts["stage 1"].target_us, result.parts["cached"].target_us = first, cached
    return result


def _check(model: AdaptedModel, images: Tensor, labels: Tensor) -> tuple[Errors, Errors]:
    """Compare ours and upstream's form, in our precision, with upstream's in a higher one."""

    def found(network: nn.Module, of: nn.Module, amp: bool) -> dict[str, Tensor]:
        def logits():
            x = images.to(next(of.parameters()).dtype)
            with _autocast() if amp else nullcontext():
                return network(x)

        trained = [p for p in of.parameters() if p.requires_grad]
        return steps.outputs(logits, labels, trained)

    precise = copy.deepcopy(model)
    if not torch.cuda.is_available():
        precise.double()
    truth = found(CLAdapterModel(precise), precise, False)
    return steps.check(found(model, model, True), found(CLAdapterModel(model), model, True), truth)


def _autocast(dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager:
    if not torch.cuda.is_available():
        return nullcontext()
    return torch.autocast("cuda", dtype=dtype)


# The steps are many and the labels random: a tiny learning rate keeps the weights as they are.
LR = 1e-7


def _step(
    model: AdaptedModel,
    logits: Callable[[Tensor], Tensor],
    labels: Tensor,
    inputs: Tensor,
    graph: bool,
) -> Callable[[], object]:
    """Return the trainer's step, with an optimizer of its own over what the model trains now."""
    optimizer = make_optimizer(model, TrainConfig(lr=LR))
    step = training_step(logits, optimizer, _autocast, graph=graph, say=steps.say)
    return lambda: step(LR, labels, inputs)


def _compiled(model: AdaptedModel) -> Callable[[Tensor], Tensor]:
    """Return the model's logits with its frozen backbone through torch.compile."""
    features = torch.compile(lambda x: model.feature_fn(model.backbone, x), dynamic=False)

    def logits(images: Tensor) -> Tensor:
        with torch.no_grad():
            found = features(images)
        return model.classify_features(model.adapter_input(found))

    return logits


def _upstream_step(
    model: AdaptedModel, upstream: CLAdapterModel, labels: Tensor, images: Tensor
) -> Callable[[], None]:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=LR)
    scaler = torch.amp.GradScaler(enabled=torch.cuda.is_available())

    def step() -> None:
        with _autocast(torch.float16):
            logits = upstream(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


BENCHMARK = Benchmark(TITLE, NOTES, run)
