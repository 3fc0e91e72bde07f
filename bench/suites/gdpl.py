"""Time GDPL's training step and inference at ViT-B/16 beside upstream's loop restated."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.cuda_graph import GraphedCall
from fastadapt.export.fold import fold
from fastadapt.gdpl import GDPLConfig, GDPLModel, GDPLTrainConfig
from fastadapt.gdpl.clip import text_tower
from fastadapt.gdpl.loop import make_optimizer
from fastadapt.train.step import training_step

from .. import harness
from .. import network_step as steps
from ..protocol import Benchmark, Errors, LeftOut, Outcome, Record
from ..upstream import GDPLLoop

TITLE = "GDPL: images × classes, prompts of 2, depth 9, rank 4"
NOTES = (
    "Random ViT-B/16 weights; wall time, without domain encoder. Ours is the step of `fastadapt "
    "gdpl`, replays of a CUDA graph with the copy of the batch into it, "
    "checkpointed with `--grad-checkpointing`; inference is the folded model in an "
    "`fa.GraphedCall`, with the copies of images and features in and logits out. “Ours, eager” is "
    "the same without graphs. Upstream is its loop restated in the same dtype, in eager calls: one "
    "pass of the text branch per image, over all classes at the whole context length; SGD as ours. "
    "Peak memory includes the measured model's weights (ours has its token embedding on the CPU, "
    "as in training), optimizer and inputs, and of a graph its capture. Not in this suite: "
    "torch.compile, which would take minutes here."
)
SHAPES = ((4, 10), (4, 100), (32, 10), (32, 100))
SPEEDUPS = {(4, 10): 5, (32, 100): 8}  # asked for
FEATURES = 512  # width of the domain features, which both sides get
LR = 1e-7
CHECKED = 4  # images that are checked: upstream's graph in fp32 grows with them
# On a CPU: the same structure, small.
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 3, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 16},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 3,
    },
}


class _Batch(NamedTuple):
    """Images [B, 3, H, W], domain features [B, FEATURES] and labels [B]."""

    images: Tensor
    features: Tensor
    labels: Tensor


def make_clip() -> nn.Module:
    """Make a CLIP model with random weights: ViT-B/16 on a GPU, ``SMALL`` on a CPU."""
    import open_clip

    torch.manual_seed(0)
    if torch.cuda.is_available():
        clip = open_clip.create_model("ViT-B-16", pretrained=None)
    else:
        clip = open_clip.CLIP(**SMALL)
    return clip.to(harness.device(), harness.dtype())


def make_model(clip: nn.Module, classes: int) -> tuple[GDPLModel, Tensor]:
    """Return a model with random weights, and its texts' tokens [classes, context length]."""
    import open_clip

    torch.manual_seed(0)
    config = GDPLConfig() if harness.device().type == "cuda" else GDPLConfig(depth=3, rank_depth=3)
    # Two to four words each, as data sets of scenes have them.
    names = [f"{'very ' * (i % 3)}class {i}" for i in range(classes)]
    model = GDPLModel(clip, FEATURES, names, config).to(harness.device(), harness.dtype()).eval()
    low_rank: Any = model.low_rank
    for branch in (low_rank.text, low_rank.vision):
        branch.out_proj_B.data.normal_(std=0.02)  # it starts at zero, which would hide it
    texts = [config.template.format(name) for name in names]
    tower: Any = text_tower(clip)
    length = tower.positional_embedding.shape[0]
    return model, open_clip.tokenize(texts, length).to(harness.device())


def run(quick: bool = False) -> Iterator[Outcome]:
    """Time every shape."""
    if importlib.util.find_spec("open_clip") is None:
        yield LeftOut("open_clip is not installed (pip install 'fastadapt[clip]')")
        return
    clip = make_clip()
    for batch, classes in SHAPES[:1] if quick or not torch.cuda.is_available() else SHAPES:
        yield record(clip, batch, classes)


def record(clip: nn.Module, batch: int, classes: int) -> Record:
    """Check one number of images and classes, then time it."""
    model, tokens = make_model(clip, classes)
    upstream = GDPLLoop(model, tokens)
    device, dtype = harness.device(), harness.dtype()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(batch, *size, device=device, dtype=dtype)
    features = torch.randn(batch, FEATURES, device=device, dtype=dtype)
    labels = torch.randint(classes, (batch,), device=harness.device())

    result = Record(f"{batch} × {classes}", "images × classes", batch * classes)
    few = _Batch(images[:CHECKED], features[:CHECKED], labels[:CHECKED])
    folded: Any = fold(model)
    result.errors, result.wrong = _check(model, folded, upstream, tokens, few)
    if result.wrong:
        return result

    def step(network: nn.Module, graph: bool = False) -> steps.Step:
        # A tiny learning rate keeps the weights as they are.
        optimizer = make_optimizer(model, GDPLTrainConfig(lr=LR))
        take = training_step(network, optimizer, graph=graph, say=steps.say)
        found = steps.measure(lambda: take(LR, labels, images, features), graph=graph)
        model.zero_grad(set_to_none=True)
        return found

    def infer(network: nn.Module, graph: bool = False) -> steps.Step:
        call = GraphedCall(network, say=steps.say) if graph else torch.no_grad()(network)
        return steps.measure(lambda: call(images, features), graph=graph)

    def ours(measured: Callable[..., steps.Step], network: nn.Module) -> dict[str, steps.Step]:
        found = {"ours": measured(network, graph=True)}
        # Without a GPU it is the same.
        return found | ({"ours, eager": measured(network)} if images.is_cuda else {})

    # Weights of a model that is not measured wait on the CPU.
    folded.to("cpu")
    loop = {"training": step(upstream), "inference": infer(upstream)}
    del upstream
    model.offload_token_embedding()
    found = {"training step": {"upstream": loop["training"], **ours(step, model)}}
    model.set_grad_checkpointing()
    checkpointed = {"upstream": loop["training"], **ours(step, model)}
    found["training step, checkpointed"] = checkpointed
    model.to("cpu")
    folded.to(images.device)
    folded.offload_token_embedding()
    found["inference"] = {"upstream": loop["inference"], **ours(infer, folded)}
    result.parts = {name: steps.part(values) for name, values in found.items()}
    target = SPEEDUPS.get((batch, classes)) if torch.cuda.is_available() else None
    if target is not None:
        for part in result.parts.values():
            part.target_speedup = target, "upstream"
    return result


def _check(
    model: GDPLModel,
    folded: nn.Module,
    upstream: GDPLLoop,
    tokens: Tensor,
    batch: _Batch,
) -> tuple[Errors, Errors]:
    """Compare logits and gradients of both with upstream's loop in fp32 (on a CPU fp64)."""
    images, features, labels = batch

    def found(network: nn.Module, of: GDPLModel) -> dict[str, Tensor]:
        kind = next(of.parameters()).dtype
        trained = [p for p in of.parameters() if p.requires_grad]
        outputs = steps.outputs(
            lambda: network(images.to(kind), features.to(kind)), labels, trained
        )
        return outputs | {"folded logits": outputs["logits"]}

    precise = copy.deepcopy(model).to(torch.float32 if images.is_cuda else torch.float64)
    truth = found(GDPLLoop(precise, tokens), precise)
    ours = found(model, model)
    graphed = GraphedCall(folded, say=steps.say)
    logits = graphed(images, features)
    assert isinstance(logits, Tensor)
    ours["folded logits"] = logits.to(truth["logits"].dtype)
    return steps.check(ours, found(upstream, model), truth)


BENCHMARK = Benchmark(TITLE, NOTES, run)
