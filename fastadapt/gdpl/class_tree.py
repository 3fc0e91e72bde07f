"""Merge the texts of all classes into one tree of tokens, so that shared tokens run once.

Text attention is causal: the value of a token depends on the tokens before it alone. With C texts
t_c = (t_c1 … t_cL), the nodes are the distinct prefixes (t_c1 … t_cl), N of them, and

    (1) X        = [embedding of every node; prompt]        [N, D]     one row per prefix
    (2) mask[i, j] = 0 if node j is a prefix of node i, else −inf      [N, N]
    (3) features = encoder(X, mask)[end node of each text]  [C, D]

which equals encoding the C texts one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.gdpl.clip import pool_type, project_text, run_blocks, text_tower
from fastadapt.gdpl.low_rank import LowRankUpdate
from fastadapt.kernels.common.arithmetic import ceil_div
from fastadapt.kernels.common.dispatch import compute_dtype

Tokenizer = Callable[..., Tensor]  # (texts, context_length=77) to token ids [texts, 77]


class ClassTree(nn.Module):
    """Hold the tree of tokens of some classes' texts.

    Texts that begin alike share their first nodes: the start token, the prompt and the template's
    words are there once and not once per class, nothing follows an end token, and no text is
    padded to the length of another. A node attends to itself and to the nodes above it.

    Args:
        text: the text branch.
        rows: the tokens of every text, from the start token to the end token.
        n_ctx: prompt tokens, which follow the start token.

    Attributes:
        embeddings: [N, D], tokens and positions of all nodes but the prompt's.
        ends: [classes], the nodes of the end tokens.
    """

    def __init__(self, text: nn.Module, rows: Sequence[Sequence[int]], n_ctx: int):
        super().__init__()
        prompt = {tuple(rows[0][:end]) for end in range(2, 2 + n_ctx)}
        prefixes = {tuple(row[:end]): None for row in rows for end in range(1, len(row) + 1)}
        nodes = sorted(prefixes, key=lambda node: node in prompt)
        index = {node: i for i, node in enumerate(nodes)}
        # Attention on GPUs copies masks whose rows do not start at multiples of 8 values.
        mask = torch.full((len(nodes), ceil_div(len(nodes), 8) * 8), float("-inf"))
        for node, i in index.items():
            for end in range(1, len(node) + 1):
                mask[i, index[node[:end]]] = 0

        device = text.positional_embedding.device
        own = nodes[: len(nodes) - n_ctx]
        positions = torch.tensor([len(node) - 1 for node in own], device=device)
        with torch.no_grad():
            embeddings = embed_tokens(text, [node[-1] for node in own])
            embeddings = embeddings + text.positional_embedding[positions]
        ends = torch.tensor([index[tuple(row)] for row in rows])
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("_mask", mask.to(device, embeddings.dtype), persistent=False)
        self.register_buffer("ends", ends.to(device), persistent=False)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the mask [N + n_ctx, N + n_ctx] to add to attention's scores, the prompt last.

        It is 0 where a node (row) sees another, else −inf.
        """
        return self._mask.to(dtype)[:, : len(self._mask)]

    def extra_repr(self) -> str:
        """Describe the sizes for ``repr``."""
        return f"classes={len(self.ends)}, nodes={len(self._mask)}"


class ClassPrompts(nn.Module):
    """Tokenize the texts of all classes once, and run the text branch on them.

    Args:
        clip: an open_clip model; its text branch is used, not held.
        class_names: one per class; underscores become spaces, as upstream does.
        template: a text with ``{}`` for the name. The ``n_ctx`` tokens after the start token are
            replaced by the prompt; a template with fewer words before the name gets
            placeholders there instead of its words.
        n_ctx: prompt tokens.
        tokenizer: open_clip's for this model.
        chunk: classes per tree. More make larger attention masks, fewer repeat the shared nodes;
            trees run in sequence, which also bounds memory in evaluation.

    Attributes:
        context: [n_ctx, D], embeddings of the words that the prompt replaces, to start it from;
            ``None`` for placeholders.

    Raises:
        InputError: no or duplicate names, a text that exceeds the context length, a template
            without ``{}``, a tokenizer of another model.
    """

    def __init__(
        self,
        clip: nn.Module,
        class_names: Sequence[str],
        template: str,
        n_ctx: int,
        tokenizer: Tokenizer,
        chunk: int = 128,
    ):
        super().__init__()
        if chunk < 1:
            raise InputError(f"class_chunk is {chunk}; expected at least 1")
        text = text_tower(clip)
        rows, has_words = tokenize_classes(clip, class_names, template, n_ctx, tokenizer)
        positions = text.positional_embedding[1 : 1 + n_ctx].detach().clone()
        self.register_buffer("positions", positions, persistent=False)
        context = None
        if has_words:
            context = embed_tokens(text, rows[0][1 : 1 + n_ctx])
        self.register_buffer("context", context, persistent=False)
        chunks = [rows[start : start + chunk] for start in range(0, len(rows), chunk)]
        self.trees = nn.ModuleList(ClassTree(text, part, n_ctx) for part in chunks)

    def encode(
        self,
        clip: nn.Module,
        prompt: Tensor,
        deep_prompts: Tensor,
        updates: Sequence[LowRankUpdate],
        grad_checkpointing: bool = False,
    ) -> Tensor:
        """Return text features [B, classes, embed_dim] for B images, not normalised.

        Args:
            clip: the model that this was made with.
            prompt: [B, n_ctx, D], in the first layer.
            deep_prompts: [depth − 1, 1, n_ctx, D], in the layers after it.
            updates: of the first layers' attention.
        """
        text = text_tower(clip)
        prompt = prompt.to(self.positions.dtype) + self.positions
        features = []
        for tree in self.trees:
            x = torch.cat([tree.embeddings.expand(prompt.shape[0], -1, -1), prompt], dim=1)
            mask = tree.mask(compute_dtype(x))  # cast once, not in every layer
            blocks = text.transformer.resblocks
            x = run_blocks(blocks, x, deep_prompts, updates, mask, grad_checkpointing)
            features.append(project_text(text, x.index_select(1, tree.ends)))
        return torch.cat(features, dim=1)


@torch.no_grad()
def embed_tokens(text: nn.Module, tokens: Sequence[int]) -> Tensor:
    """Return embeddings [tokens, D] on the text branch's device, wherever the table is."""
    table = text.token_embedding.weight
    return table[torch.tensor(tokens, device=table.device)].to(text.positional_embedding.device)


def tokenize_classes(
    clip: nn.Module, class_names: Sequence[str], template: str, n_ctx: int, tokenizer: Tokenizer
) -> tuple[list[list[int]], bool]:
    """Tokenize the classes' texts, each up to its end token.

    Returns:
        One row of tokens per class, and whether the template has words where the prompt goes.

    Raises:
        InputError: as :class:`ClassPrompts`.
    """
    if isinstance(class_names, str):
        raise InputError(f"class_names is the text {class_names!r}; expected a list of names")
    if not class_names:
        raise InputError("class_names is empty; expected at least one name")
    if template.count("{}") != 1:
        raise InputError(f"template is {template!r}; expected one {{}} in it, for the class name")
    if not all(isinstance(name, str) and name.strip(" _") for name in class_names):
        raise InputError(f"class_names holds an empty name: {list(class_names)}")
    text = text_tower(clip)
    length = len(text.positional_embedding)

    def tokenize(texts: list[str]) -> list[list[int]]:
        # One position more than the model has: tokenizers truncate longer texts silently.
        tokens = tokenizer(texts, context_length=length + 1)
        if pool_type(clip) == "eos":
            eos = getattr(clip, "text_eos_id", None) or text.eos_id
            ends = (tokens == eos).int().argmax(dim=-1)
        else:
            ends = tokens.argmax(dim=-1)
        return [row[: end + 1].tolist() for row, end in zip(tokens, ends, strict=True)]

    before, _, after = template.partition("{}")
    has_words = len(tokenize([before])[0]) - 2 >= n_ctx
    if not has_words:
        before = "X " * n_ctx
    rows = tokenize([before + name.replace("_", " ") + after for name in class_names])
    known = text.token_embedding.num_embeddings
    highest = max(max(row) for row in rows)
    if highest >= known:
        raise InputError(
            f"the tokenizer gives token {highest}, but the model has {known}: pass this model's "
            "tokenizer"
        )
    seen: dict[tuple[int, ...], str] = {}
    for name, row in zip(class_names, rows, strict=True):
        if len(row) > length:
            raise InputError(
                f"class name {name!r} is too long: with the template {template!r} it exceeds the "
                f"model's context of {length} tokens; shorten the name"
            )
        if tuple(row) in seen:
            raise InputError(
                f"class names {seen[tuple(row)]!r} and {name!r} are the same text to the model: "
                "give every class a name of its own"
            )
        seen[tuple(row)] = name
    return rows, has_words
