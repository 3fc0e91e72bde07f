"""Restate GDPL from its published formulas, one image, layer and prompt at a time.

It reads upstream's state dict and the frozen weights of an open_clip model, encodes every text of
every image at full length, and shares no code with the library.
"""

import torch
import torch.nn.functional as F

from tests.helpers.upstream import hamilton


def upstream_state(clip, feature_dim, n_ctx, depth, rank, rank_depth, hidden):
    """Draw random weights under upstream's keys, in fp64."""
    text, vision = clip.positional_embedding.shape[1], clip.visual.class_embedding.shape[0]

    def quaternion(name, i, o):
        shapes = {f"{c}_weight": (i // 4, o // 4) for c in "rijk"} | {"bias": (o,)}
        return {f"{name}.{key}": shape for key, shape in shapes.items()}

    shapes = {
        "prompt_learner.ctx": (n_ctx, text),
        "prompt_learner.proj.weight": (vision, text),
        "prompt_learner.proj.bias": (vision,),
        "prompt_learner.meta_net.linear1.weight": (hidden, feature_dim),
        "prompt_learner.meta_net.linear1.bias": (hidden,),
        "prompt_learner.meta_net.linear2.weight": (text, hidden),
        "prompt_learner.meta_net.linear2.bias": (text,),
        "lora_relation": (2, 2),
        **quaternion("prompt_learner.visual_net_mq", 2 * text, text),
    }
    for i in range(depth - 1):
        shapes[f"prompt_learner.compound_prompts_text.{i}"] = (n_ctx, text)
        name = f"prompt_learner.compound_prompt_projections.{i}"
        shapes |= quaternion(name, 2 * text, vision)
    for branch, d in (("image_encoder", vision), ("text_encoder", text)):
        for i in range(rank_depth):
            attn = f"{branch}.transformer.resblocks.{i}.attn"
            shapes |= {
                f"{attn}.in_proj_weight_lora_A": (rank, d),
                f"{attn}.in_proj_weight_lora_B": (3 * d, rank),
                f"{attn}.in_proj_weight_lora_S": (rank,),
                f"{attn}.out_proj.lora_A": (rank, d),
                f"{attn}.out_proj.lora_B": (d, rank),
            }
    return {key: 0.3 * torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}


def low_rank(state, branch, layer, alpha, relation=True):
    """Compute the updates of in_proj and out_proj of one layer, or zeros."""
    attn = f"{branch}.transformer.resblocks.{layer}.attn"
    if f"{attn}.out_proj.lora_A" not in state:
        return 0, 0
    scale = {
        name: state[f"{name}.transformer.resblocks.{layer}.attn.in_proj_weight_lora_S"]
        for name in ("image_encoder", "text_encoder")
    }
    both = torch.stack([scale["image_encoder"], scale["text_encoder"]], dim=-1)
    both = both + both @ state["lora_relation"]
    s = both[:, 0 if branch == "image_encoder" else 1]
    a, b = (state[f"{attn}.in_proj_weight_lora_{side}"] for side in "AB")
    out_a, out_b = state[f"{attn}.out_proj.lora_A"], state[f"{attn}.out_proj.lora_B"]
    return alpha / len(a) / 4 * b @ torch.diag(s) @ a, alpha / len(a) * out_b @ out_a


def layer_forward(block, x, updates, causal):
    """Run one pre-norm transformer layer on [N, D], a head at a time."""
    attn, d = block.attn, x.shape[1]
    y = block.ln_1(x)
    q, k, v = (y @ (attn.in_proj_weight + updates[0]).T + attn.in_proj_bias).split(d, dim=1)
    width = d // attn.num_heads
    heads = []
    for h in range(attn.num_heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / width**0.5
        if causal:
            later = torch.ones(len(x), len(x)).triu(1).bool()
            scores = scores.masked_fill(later, float("-inf"))
        heads.append(scores.softmax(dim=-1) @ v[:, part])
    y = torch.cat(heads, dim=1) @ (attn.out_proj.weight + updates[1]).T + attn.out_proj.bias
    x = x + y
    return x + block.mlp(block.ln_2(x))


def encode_image(clip, state, image, first, deeper, alpha):
    visual = clip.visual
    x = visual.conv1(image[None])[0].flatten(1).T
    x = torch.cat([visual.class_embedding[None], x]) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, first]))
    for i, block in enumerate(visual.transformer.resblocks):
        if 1 <= i <= len(deeper):
            x = torch.cat([x[: -len(first)], deeper[i - 1]])
        x = layer_forward(block, x, low_rank(state, "image_encoder", i, alpha), causal=False)
    return visual.ln_post(x[0]) @ visual.proj


def encode_text(clip, state, tokens, first, deeper, alpha):
    n = len(first)
    x = clip.token_embedding(tokens)
    x = torch.cat([x[:1], first, x[1 + n :]]) + clip.positional_embedding
    for i, block in enumerate(clip.transformer.resblocks):
        if 1 <= i <= len(deeper):
            x = torch.cat([x[:1], deeper[i - 1], x[1 + n :]])
        x = layer_forward(block, x, low_rank(state, "text_encoder", i, alpha), causal=True)
    return clip.ln_final(x[tokens.argmax()]) @ clip.text_projection


def upstream_logits(clip, state, images, features, tokens, alpha=1.0, noise=None):
    """Compute logits [B, classes].

    Args:
        clip: open_clip model in fp64.
        state: see :func:`upstream_state`.
        images: [B, 3, H, W].
        features: [B, D_f], of the domain encoder.
        tokens: [classes, context length].
        noise: [B, text width], standard normal; none if ``None``.
    """

    def learned(name):
        return state[f"prompt_learner.{name}"]

    def quaternion(name, x):
        x = torch.cat([torch.zeros_like(x), x], dim=-1)
        weights = [learned(f"{name}.{c}_weight") for c in "rijk"]
        return hamilton(x, *weights) + learned(f"{name}.bias")

    deep_text = []
    while f"prompt_learner.compound_prompts_text.{len(deep_text)}" in state:
        deep_text.append(learned(f"compound_prompts_text.{len(deep_text)}"))
    first_vision = learned("ctx") @ learned("proj.weight").T + learned("proj.bias")
    rows = []
    for index, (image, f) in enumerate(zip(images, features, strict=True)):
        h = (learned("meta_net.linear1.weight") @ f + learned("meta_net.linear1.bias")).relu()
        bias = learned("meta_net.linear2.weight") @ h + learned("meta_net.linear2.bias")
        shifted = learned("ctx") + bias
        if noise is not None:
            shifted = shifted + noise[index] * features.mean()
        first_text = quaternion("visual_net_mq", shifted)
        deep_vision = [
            quaternion(f"compound_prompt_projections.{i}", p + bias)
            for i, p in enumerate(deep_text)
        ]
        image_feature = encode_image(clip, state, image, first_vision, deep_vision, alpha)
        image_feature = image_feature / image_feature.norm()
        texts = [encode_text(clip, state, t, first_text, deep_text, alpha) for t in tokens]
        texts = torch.stack([t / t.norm() for t in texts])
        rows.append(clip.logit_scale.exp() * texts @ image_feature)
    return torch.stack(rows)


def cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels)
