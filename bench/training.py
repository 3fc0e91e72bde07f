"""Training steps: stage 1 on images and on cached features, and stage 2, beside upstream's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.adapt import AdaptedModel
from fastadapt.bench import harness, steps
from fastadapt.bench.cladapter import formulation
from fastadapt.bench.cluster_attention import upstream_formulation
from fastadapt.features import as_tokens
from fastadapt.train_config import TrainConfig
from fastadapt.trainer import make_optimizer

TITLE = "Training step, CLAdapter behind a frozen backbone (stage 1) or with it (stage 2)"
NOTES = (
    "Forward, loss, backward and optimizer, from a batch in the GPU's memory; eager calls, wall "
    "time. Upstream is its recipe restated: fp16 autocast with loss scaling, Adam, the backbone "
    "called within the graph, the adapter with its [B, K, R, R]. Ours is what `fastadapt train` "
    "does: bf16 autocast, AdamW, no graph for frozen features, kernels where they are the default; "
    "cached means that the features of stage 1 are there already (upstream has no cache: its stage "
    "1 stands beside it). Peak memory includes weights, optimizer and batch."
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


class Upstream(nn.Module):
    """Upstream's forward pass on the weights of an adapted model, the backbone in the graph."""

    def __init__(self, model: AdaptedModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model, adapter = self.model, self.model.adapter
        x = model._feature_fn(model.backbone, images)[:, model.spec.num_prefix_tokens :]
        x = adapter.norm1(as_tokens(model, x))
        for block in adapter.blocks:
            x = formulation(block, upstream_formulation)(x)
        return model.head(adapter.norm2(x).mean(1))


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Times every backbone and batch; see :func:`fastadapt.bench.run`."""
    shapes = SHAPES if torch.cuda.is_available() else CPU
    for index, ((name, batch), targets) in enumerate(shapes.items()):
        if not quick or index == 0:
            yield record(name, batch, *targets)


def record(name: str, batch: int, first: tuple, cached: tuple) -> dict[str, Any]:
    """One backbone and batch: checked, then timed."""
    import timm

    torch.manual_seed(0)
    where = harness.device()
    backbone = timm.create_model(name, pretrained=False).to(where)
    model = fa.adapt(backbone, num_classes=CLASSES).train()
    upstream = Upstream(model)
    images = torch.randn(batch, *model.spec.input_size, device=where)
    labels = torch.randint(CLASSES, (batch,), device=where)
    result: dict[str, Any] = {
        "shape": f"{name}, {batch}",
        "dimensions": "backbone, batch",
        "size": batch,
    }

    result["errors"], wrong = _check(model, images, labels)
    if wrong:
        return result | {"wrong": wrong}

    def time(forward: Callable[[], Tensor], ours: bool) -> dict[str, Any]:
        return steps.measure(_step(model, forward, labels, ours))

    theirs = time(lambda: upstream(images), False)
    # As the trainer has it: convolutions read channels last, the cache holds fp16 tokens.
    model.to(memory_format=torch.channels_last)
    last = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), _autocast(ours=True):
        features = model.backbone_features(last)
    shape, layout = features.shape, model.spec.layout
    features = as_tokens(model, features).to(torch.float16).contiguous()

    def from_cache() -> Tensor:
        x = features.float()
        if layout == "channels_first":
            x = x.transpose(1, 2).view(shape)
        elif layout == "channels_last":
            x = x.view(shape)
        return model.forward_head(model.adapt_features(x))

    parts = {
        "stage 1": {"upstream": theirs, "ours": time(lambda: model(last), True)},
        "cached": {"upstream": theirs, "ours": time(from_cache, True)},
    }
    model.unfreeze()
    parts["stage 2"] = {
        "ours": time(lambda: model(last), True),
        "upstream": time(lambda: upstream(images), False),
    }
    targets = {"stage 1": first, "cached": cached}
    result["parts"] = {
        part: steps.part(found, **({"target_us": targets[part]} if targets.get(part) else {}))
        for part, found in parts.items()
    }
    return result


def _check(model: AdaptedModel, images: Tensor, labels: Tensor):
    """Ours and upstream's form, both in our precision, against upstream's in a higher one."""

    def found(network: nn.Module, of: nn.Module, amp: bool) -> dict[str, Tensor]:
        def logits():
            x = images.to(next(of.parameters()).dtype)
            with _autocast(ours=True) if amp else nullcontext():
                return network(x)

        trained = [p for p in of.parameters() if p.requires_grad]
        return steps.outputs(logits, labels, trained)

    precise = copy.deepcopy(model)
    if not torch.cuda.is_available():
        precise.double()
    truth = found(Upstream(precise), precise, False)
    return steps.check(found(model, model, True), found(Upstream(model), model, True), truth)


def _autocast(ours: bool):
    if not torch.cuda.is_available():
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16 if ours else torch.float16)


def _step(
    model: AdaptedModel, forward: Callable[[], Tensor], labels: Tensor, ours: bool
) -> Callable[[], None]:
    """A step with an optimizer of its own over what the model trains now."""
    # The steps are many and the labels random: a tiny learning rate keeps the weights as they are.
    if ours:
        optimizer = make_optimizer(model, TrainConfig(lr=1e-7))
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-7)
    scaler = torch.amp.GradScaler(enabled=not ours and torch.cuda.is_available())

    def step() -> None:
        with _autocast(ours):
            logits = forward()
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step
