"""GDPL's training step and inference at ViT-B/16, against upstream's loop restated."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.backbones import embed_clip_patches
from fastadapt.cuda_graph import GraphedCall
from fastadapt.export.fold import fold
from fastadapt.gdpl import GDPLConfig, GDPLModel, GDPLTrainConfig
from fastadapt.gdpl.clip import text_tower
from fastadapt.gdpl.loop import make_optimizer
from fastadapt.train.step import training_step

from .. import harness
from .. import network_step as steps
from .prompt_learner import upstream_prompts

TITLE = "GDPL: images × classes, prompts of 2, depth 9, rank 4"
NOTES = (
    "Random ViT-B/16 weights; wall time, without domain encoder. Ours is the step of `fastadapt "
    "train --method gdpl`, replays of a CUDA graph with the copy of the batch into it, "
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
FEATURES = 512  # width of the domain features, which both sides are given
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


class UpstreamLoop(nn.Module):
    """The paper's code restated on the weights of a :class:`GDPLModel`.

    One pass of the text branch per image, at the model's whole context length; quaternion products
    on inputs padded with zeros, one network after the other; attention as products and a softmax.

    Args:
        model: whose weights are used.
        tokens: [classes, context length], the texts' tokens.
    """

    def __init__(self, model: GDPLModel, tokens: Tensor):
        super().__init__()
        self.model = model
        with torch.no_grad():
            embedded = text_tower(model.clip).token_embedding(tokens)
        self.prefix, self.suffix = embedded[:, :1], embedded[:, 1 + model.config.n_ctx :]
        self.ends = tokens.argmax(dim=-1)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        model, visual = self.model, self.model.clip.visual
        first, prompt, deep = upstream_prompts(model.prompt_learner, features)
        vision, text = model.low_rank()
        x = embed_clip_patches(visual, images)
        x = torch.cat([x, visual.ln_pre(prompt.expand(len(x), -1, -1))], dim=1)
        n = prompt.shape[0]
        for index, block in enumerate(visual.transformer.resblocks):
            if 1 <= index <= len(deep):
                x = torch.cat([x[:, :-n], deep[index - 1]], dim=1)
            x = _block(block, x, vision[index] if index < len(vision) else None, None)
        image_features = visual.ln_post(x[:, 0]) @ visual.proj
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        logits = []
        for prompt, feature in zip(first, image_features, strict=True):
            text_features = self._encode_text(prompt, text)
            text_features = text_features / text_features.norm(dim=-1, keepdim=True)
            logits.append(model.clip.logit_scale.exp() * feature @ text_features.t())
        return torch.stack(logits)

    def _encode_text(self, prompt: Tensor, updates) -> Tensor:
        tower, deep = text_tower(self.model.clip), self.model.prompt_learner.deep_ctx
        classes, n = len(self.prefix), len(prompt)
        x = torch.cat([self.prefix, prompt.expand(classes, -1, -1), self.suffix], dim=1)
        x = x + tower.positional_embedding
        mask = tower.attn_mask.to(x.dtype)
        for index, block in enumerate(tower.transformer.resblocks):
            if 1 <= index <= len(deep):
                deeper = deep[index - 1].expand(classes, -1, -1)
                x = torch.cat([x[:, :1], deeper, x[:, 1 + n :]], dim=1)
            x = _block(block, x, updates[index] if index < len(updates) else None, mask)
        rows = torch.arange(classes, device=x.device)
        return tower.ln_final(x)[rows, self.ends] @ tower.text_projection


def _block(block: nn.Module, x: Tensor, update, mask: Tensor | None) -> Tensor:
    attn, (batch, tokens, _) = block.attn, x.shape
    y = block.ln_1(x)
    qkv = F.linear(y, attn.in_proj_weight, attn.in_proj_bias)
    if update is not None:
        qkv = qkv + F.linear(F.linear(y, update.in_a), update.in_b)
    q, k, v = (
        part.view(batch, tokens, attn.num_heads, -1).transpose(1, 2).flatten(0, 1)
        for part in qkv.chunk(3, dim=-1)
    )
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
    scores = scores if mask is None else scores + mask
    y = (scores.softmax(dim=-1) @ v).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
    out = attn.out_proj(y)
    if update is not None:
        out = out + F.linear(F.linear(y, update.out_a), update.out_b)
    x = x + out
    return x + block.mlp(block.ln_2(x))


def make_clip() -> nn.Module:
    """A CLIP model with random weights: ViT-B/16 on a GPU, ``SMALL`` on a CPU."""
    import open_clip

    torch.manual_seed(0)
    if torch.cuda.is_available():
        clip = open_clip.create_model("ViT-B-16", pretrained=None)
    else:
        clip = open_clip.CLIP(**SMALL)
    return clip.to(harness.device(), harness.dtype())


def make_model(clip: nn.Module, classes: int) -> tuple[GDPLModel, Tensor]:
    """A model with random weights, and the tokens of its texts [classes, context length]."""
    import open_clip

    torch.manual_seed(0)
    config = GDPLConfig() if harness.device().type == "cuda" else GDPLConfig(depth=3, rank_depth=3)
    # Two to four words each, as data sets of scenes have them.
    names = [f"{'very ' * (i % 3)}class {i}" for i in range(classes)]
    model = GDPLModel(clip, FEATURES, names, config).to(harness.device(), harness.dtype()).eval()
    for branch in (model.low_rank.text, model.low_rank.vision):
        branch.out_proj_B.data.normal_(std=0.02)  # it starts at zero, which would hide it
    texts = [config.template.format(name) for name in names]
    length = text_tower(clip).positional_embedding.shape[0]
    return model, open_clip.tokenize(texts, length).to(harness.device())


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Times every shape; see :func:`fastadapt.bench.run`."""
    if importlib.util.find_spec("open_clip") is None:
        yield {"left_out": "open_clip is not installed (pip install 'fastadapt[clip]')"}
        return
    clip = make_clip()
    for batch, classes in SHAPES[:1] if quick or not torch.cuda.is_available() else SHAPES:
        yield record(clip, batch, classes)


def record(clip: nn.Module, batch: int, classes: int) -> dict[str, Any]:
    """One number of images and classes: checked, then timed."""
    model, tokens = make_model(clip, classes)
    upstream = UpstreamLoop(model, tokens)
    where = {"device": harness.device(), "dtype": harness.dtype()}
    size = model.pretrained_cfg["input_size"]
    images, features = torch.randn(batch, *size, **where), torch.randn(batch, FEATURES, **where)
    labels = torch.randint(classes, (batch,), device=harness.device())

    result: dict[str, Any] = {
        "shape": f"{batch} × {classes}",
        "dimensions": "images × classes",
        "size": batch * classes,
    }
    few = images[:CHECKED], features[:CHECKED], labels[:CHECKED]
    folded = fold(model)
    result["errors"], wrong = _check(model, folded, upstream, tokens, *few)
    if wrong:
        return result | {"wrong": wrong}

    def step(network: nn.Module, graph: bool = False) -> dict[str, Any]:
        # A tiny learning rate keeps the weights as they are.
        optimizer = make_optimizer(model, GDPLTrainConfig(lr=LR))
        take = training_step(network, optimizer, graph=graph, say=steps.say)
        found = steps.measure(lambda: take(LR, labels, images, features), graph=graph)
        model.zero_grad(set_to_none=True)
        return found

    def infer(network: nn.Module, graph: bool = False) -> dict[str, Any]:
        call = GraphedCall(network, say=steps.say) if graph else torch.no_grad()(network)
        return steps.measure(lambda: call(images, features), graph=graph)

    def ours(measured: Callable[..., dict[str, Any]], network: nn.Module) -> dict[str, Any]:
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
    folded.to(images.device).offload_token_embedding()
    found["inference"] = {"upstream": loop["inference"], **ours(infer, folded)}
    target = SPEEDUPS.get((batch, classes)) if torch.cuda.is_available() else None
    targets = {} if target is None else {"target_speedup": [target, "upstream"]}
    result["parts"] = {part: steps.part(values, **targets) for part, values in found.items()}
    return result


def _check(model, folded, upstream, tokens, images, features, labels):
    """Logits and gradients of both against upstream's loop in fp32 (on a CPU fp64)."""

    def found(network: nn.Module, of: GDPLModel) -> dict[str, Tensor]:
        kind = next(of.parameters()).dtype
        trained = [p for p in of.parameters() if p.requires_grad]
        outputs = steps.outputs(
            lambda: network(images.to(kind), features.to(kind)), labels, trained
        )
        return outputs | {"folded logits": outputs["logits"]}

    precise = copy.deepcopy(model).to(torch.float32 if images.is_cuda else torch.float64)
    truth = found(UpstreamLoop(precise, tokens), precise)
    ours = found(model, model)
    graphed = GraphedCall(folded, say=steps.say)
    ours["folded logits"] = graphed(images, features).to(truth["logits"].dtype)
    return steps.check(ours, found(upstream, model), truth)
