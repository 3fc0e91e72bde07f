"""The cases that :mod:`tools.time_fused` checks and times: operations, sizes, variants, rivals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastadapt.kernels.common.launcher import device_of

BATCHES = (8, 64, 256)
BF16 = torch.bfloat16
Call = Callable[..., Any]


@dataclass
class Case:
    """One operation at one size.

    Attributes:
        title: for the tables.
        key: operation and sizes, as its block sizes look a choice up; ``None``: nothing to choose.
        inputs: makes one set of tensors.
        exact: the same in fp32, from the same tensors.
        plain: in PyTorch, in half precision: whose error is the measure.
        variants: by name, what is chosen and the call.
        rivals: by name, calls that are timed as well.
    """

    title: str
    key: tuple[str, tuple[int, ...]] | None
    inputs: Callable[[], tuple]
    exact: Call
    plain: Call
    variants: dict[str, tuple[dict[str, int], Call]]
    rivals: dict[str, Call] = field(default_factory=dict)


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    """Draw normal numbers on the GPU."""
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


def attention_cases() -> list[Case]:
    """Return attention of ViT-B/16, beside PyTorch's on views of the product."""
    from fastadapt.kernels.qkv_attention import block_sizes, launches
    from fastadapt.kernels.qkv_attention.reference import qkv_attention_reference

    heads, size, tokens = 12, 64, 197
    scale = size**-0.5

    def ours(tile, qkv):
        return launches.attention(qkv, heads, scale, None, tile)

    def library(backend, qkv):
        with sdpa_kernel(backend):
            return qkv_attention_reference(qkv, heads)

    cases = []
    for batch in BATCHES:
        variants = {}
        for choice in block_sizes.VARIANTS:
            tile = block_sizes.tile_of(tokens, **choice)
            problem = (batch, tokens, heads, size, scale, None)
            launches.prepare(problem, tile, BF16, device_of(0))
            variants[_name(choice)] = (choice, functools.partial(ours, tile))
        kinds = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
        rivals = {k: functools.partial(library, getattr(SDPBackend, k)) for k in kinds}
        rivals["PyTorch's choice"] = lambda qkv: qkv_attention_reference(qkv, heads)
        rivals["copied, then PyTorch's"] = lambda qkv: F.scaled_dot_product_attention(
            *qkv.unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4).contiguous()
        )
        cases.append(
            Case(
                f"attention, batch {batch}",
                (block_sizes.OPERATION, (tokens, size)),
                lambda batch=batch: (randn(batch, tokens, 3 * heads * size, scale=1.5),),
                lambda qkv: qkv_attention_reference(qkv.float(), heads),
                lambda qkv: qkv_attention_reference(qkv, heads),
                variants,
                rivals,
            )
        )
    return cases


def depthwise_cases() -> list[Case]:
    """Return the depthwise convolutions of ConvNeXt-B with their norms."""
    from fastadapt.kernels import depthwise_conv2d
    from fastadapt.kernels.depthwise_norm import block_sizes, launches
    from fastadapt.kernels.depthwise_norm.reference import depthwise_norm_reference
    from fastadapt.kernels.shifted_norm.op import shifted_norm

    cases = []
    for batch in BATCHES:
        for side, channels in ((56, 128), (28, 256), (14, 512), (7, 1024)):
            shape = (batch, side, side, channels)

            def inputs(shape=shape):
                return (
                    randn(*shape),
                    randn(49, shape[3], scale=0.15),
                    randn(shape[3], dtype=torch.float32),
                )

            def ours(tile, x, w, b):
                return launches.convolve(x, w, b, 1e-6, tile)

            def two(x, w, b):
                filters = w.t().reshape(-1, 1, 7, 7)
                y = depthwise_conv2d(x.permute(0, 3, 1, 2), filters, b, padding=3)
                return shifted_norm(y.permute(0, 2, 3, 1), None, 1e-6)

            def cudnn(x, w, b):
                filters = w.t().reshape(-1, 1, 7, 7).contiguous(memory_format=torch.channels_last)
                y = F.conv2d(x.permute(0, 3, 1, 2), filters, b.to(BF16), 1, 3, 1, len(b))
                return shifted_norm(y.permute(0, 2, 3, 1), None, 1e-6)

            variants = {}
            for tile in block_sizes.variants(shape):
                if tile.rows == 14 and batch == 8:
                    continue
                dtypes = (BF16, BF16, torch.float32, BF16)
                launches.prepare(shape, False, 1e-6, tile, dtypes, device_of(0))
                variants[_name(tile._asdict())] = (tile._asdict(), functools.partial(ours, tile))
            cases.append(
                Case(
                    f"depthwise + norm {batch}×{side}×{side}×{channels}",
                    (block_sizes.OPERATION, shape),
                    inputs,
                    lambda x, w, b: depthwise_norm_reference(x.float(), w.float(), b),
                    depthwise_norm_reference,
                    variants,
                    {"our convolution, then norm": two, "cuDNN's, then norm": cudnn},
                )
            )
    return cases


def patch_cases() -> list[Case]:
    """Return the products with patches of both backbones."""
    from fastadapt.kernels.patch_embedding import block_sizes, launches
    from fastadapt.kernels.patch_embedding.checks import Norm
    from fastadapt.kernels.patch_embedding.reference import patch_embedding_reference

    kinds = {  # side, channels, patch, outputs, prefix, norm
        "ViT-B/16": (224, 3, 16, 768, 1, False),
        "stem": (224, 3, 4, 128, 0, True),
        "56 → 28": (56, 128, 2, 256, 0, False),
        "28 → 14": (28, 256, 2, 512, 0, False),
        "14 → 7": (14, 512, 2, 1024, 0, False),
    }
    cases = []
    for batch in BATCHES:
        for name, (side, channels, patch, width, prefix, norm) in kinds.items():
            depth, tokens = patch * patch * channels, prefix + (side // patch) ** 2
            norms = None
            if norm:
                ones = torch.ones(width, device="cuda")
                norms = Norm(ones, ones, 1e-6)

            def inputs(
                batch=batch,
                side=side,
                channels=channels,
                depth=depth,
                width=width,
                tokens=tokens,
                prefix=prefix,
            ):
                shape = (batch, side, side, channels)
                if channels == 3:
                    x = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
                else:
                    x = randn(*shape)
                scale = depth**-0.5 / (64 if channels == 3 else 1)
                table = (tokens, width) if prefix else (width,)
                return x, randn(width, depth, scale=scale), randn(*table, dtype=torch.float32)

            def ours(tile, x, w, table, patch=patch, tokens=tokens, norms=norms):
                return launches.embed(x, w, table, patch, tokens, norms, tile)

            def plain(x, w, table, patch=patch, norms=norms):
                return patch_embedding_reference(x, w, table, patch, norms)

            def exact(x, w, table, plain=plain):
                return plain(x if x.dtype == torch.uint8 else x.float(), w.float(), table)

            def cudnn(x, w, table, patch=patch, channels=channels):
                y = x.permute(0, 3, 1, 2)
                if channels == 3:
                    y = (y.float() - 128).to(BF16)
                filters = w.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2)
                return F.conv2d(y, filters, None, patch)

            variants = {}
            for tile in block_sizes.VARIANTS:
                if norm and tile.cols < width:
                    continue
                image = torch.uint8 if channels == 3 else BF16
                fp32 = torch.float32
                dtypes = (image, BF16, fp32, *((fp32,) * 2 if norm else ()))
                launches.prepare(
                    (batch, side, side, channels),
                    (width, patch, tokens),
                    bool(prefix),
                    1e-6 if norm else None,
                    tile,
                    dtypes,
                    device_of(0),
                )
                variants[_name(tile._asdict())] = (tile._asdict(), functools.partial(ours, tile))
            key = (block_sizes.OPERATION, (batch * tokens, depth, width))
            cases.append(
                Case(
                    f"patches {name}, batch {batch}",
                    key,
                    inputs,
                    exact,
                    plain,
                    variants,
                    {"convert, then convolution": cudnn},
                )
            )
    return cases


def narrow_cases() -> list[Case]:
    """Return the MLPs of ConvNeXt-B's first stage, beside two products and GELU."""
    from fastadapt.kernels.narrow_mlp import block_sizes, launches
    from fastadapt.kernels.narrow_mlp.reference import narrow_mlp_reference

    def exact(*tensors):
        return narrow_mlp_reference(*(t.float() for t in tensors), "tanh")

    def plain(*tensors):
        return narrow_mlp_reference(*tensors, "tanh")

    def two(x, fc1, fc1_bias, fc2, fc2_bias, residual):
        h = torch._addmm_activation(fc1_bias.to(x.dtype), x, fc1.t(), use_gelu=True)
        return residual.addmm_(h, fc2.t())

    cases = []
    for batch in BATCHES:
        rows, width, hidden = batch * 56 * 56, 128, 512

        def inputs(rows=rows, width=width, hidden=hidden):
            fc1 = randn(hidden, width, scale=width**-0.5)
            fc2 = randn(width, hidden, scale=hidden**-0.5)
            biases = (randn(n, dtype=torch.float32) for n in (hidden, width))
            return randn(rows, width), fc1, next(biases), fc2, next(biases), randn(rows, width)

        variants = {}
        for tile in block_sizes.VARIANTS:
            dtypes = (BF16, torch.float32, torch.float32, BF16)
            launches.prepare((rows, width, hidden), "tanh", tile, dtypes, device_of(0))
            call = functools.partial(launches.mlp, tile=tile, approximate="tanh")
            variants[_name(tile._asdict())] = (tile._asdict(), call)
        cases.append(
            Case(
                f"narrow MLP {rows} × {width}",
                (block_sizes.OPERATION, (rows, width)),
                inputs,
                exact,
                plain,
                variants,
                {"two products": two},
            )
        )
    return cases


CASES = {
    "attention": attention_cases,
    "depthwise": depthwise_cases,
    "patches": patch_cases,
    "narrow": narrow_cases,
}


def _name(choice: dict[str, int]) -> str:
    return " ".join(f"{key}={value}" for key, value in choice.items())
