"""The operations of a fused model: what each holds, and how it is computed.

A step maps a :class:`Flow` to the next. Weights hold what stood before and after them: the
LayerNorm's weight and bias, the layer scale, an image's normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.fusion.kernel_choices import Choices
from fastadapt.kernels import cluster_attention, layer_norm, layer_norm_mean, layer_norm_twice
from fastadapt.kernels import residual_mlp as residual_mlp_op
from fastadapt.kernels.common.e4m3 import E4M3, norm_factor
from fastadapt.kernels.depthwise_norm.op import depthwise_norm
from fastadapt.kernels.linear_epilogue.op import linear_epilogue
from fastadapt.kernels.narrow_mlp.checks import WIDEST
from fastadapt.kernels.narrow_mlp.op import narrow_mlp
from fastadapt.kernels.patch_embedding.checks import Norm
from fastadapt.kernels.patch_embedding.op import patch_embedding
from fastadapt.kernels.qkv_attention.op import qkv_attention
from fastadapt.kernels.residual_mlp.op import linear_gelu
from fastadapt.kernels.shifted_norm.op import shifted_norm


@dataclass
class Flow:
    """What passes from step to step.

    Attributes:
        x: images, tokens [B, N, C] or maps [B, H, W, C].
        choices: which kernels compute.
        shift: [C] fp32, a constant that x lacks; ``None``: nothing.
        index: of the step.
        constants: what does not depend on x, kept from the first call on.
        observe: called with a step's index and its MLP's result after GELU.
    """

    x: Tensor
    choices: Choices
    shift: Tensor | None = None
    index: int = 0
    constants: dict[tuple[int, str, bool], Tensor] = field(default_factory=dict)
    observe: Callable[[int, Tensor], None] | None = None

    def constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that does not depend on x; it is made once for these choices."""
        key = (self.index, name, self.choices.narrow)
        if key not in self.constants:
            self.constants[key] = make()
        return self.constants[key]

    def next(self, x: Tensor) -> Flow:
        """Return the flow after a step whose result is whole."""
        return replace(self, x=x, shift=None)

    def rows(self) -> Tensor:
        """Return x as [rows, C]."""
        return self.x.view(-1, self.x.shape[-1])

    def whole(self) -> Tensor:
        """Return x with all that it lacks."""
        shift = self.shift
        if shift is None:
            return self.x
        return self.x + self.constant("whole", lambda: shift.to(self.x.dtype))

    def linear(self, name: str, rows: Tensor, weight: Tensor, bias: Tensor, alpha: float) -> Tensor:
        """Return ``alpha · rows · weightᵀ + bias`` in x's dtype."""
        rounded = self.constant(name, lambda: bias.to(self.x.dtype))
        return linear_epilogue(rows, weight, rounded, alpha=alpha)

    def add_linear(
        self, name: str, a: Tensor, weight: Tensor, bias: Tensor, alpha: float = 1.0
    ) -> Flow:
        """Return the flow with ``alpha · a · weightᵀ`` added to x in place.

        The bias is what x lacks from then on.
        """
        linear_epilogue(a, weight, alpha=alpha, residual=self.rows())
        old = self.shift
        return replace(self, shift=bias if old is None else self.constant(name, lambda: old + bias))

    def mlp(self, rows: Tensor, mlp: TransformerBlock | ConvNextBlock) -> Flow:
        """Return the flow with an MLP's result added to x in place."""
        bias = mlp.fc1_bias
        if mlp.fc1_weight.dtype != E4M3 and self.choices.gelu == "none":
            u = linear_gelu(rows, mlp.fc1_weight, bias)
        else:
            rounded = self.constant("fc1", lambda: bias.to(self.x.dtype))
            factor = mlp.hidden_factor if mlp.fc2_weight.dtype == E4M3 else None
            how: dict[str, Any] = {"alpha": mlp.fc1_alpha, "gelu": True, "factor": factor}
            u = linear_epilogue(rows, mlp.fc1_weight, rounded, **how)
        if self.observe is not None:
            self.observe(self.index, u)
        return self.add_linear("fc2", u, mlp.fc2_weight, mlp.fc2_bias, mlp.fc2_alpha)


@dataclass(frozen=True)
class Patches:
    """Products with patches that do not overlap: the patch embedding, a stem.

    Attributes:
        patch: side of a patch.
        grid: 1: the result is a map [B, H / P, W / P, C]; 0: tokens [B, N, C].
        eps: of the norm of the result.
        weight: [C, P·P·D].
        table: [C] or [N, C].
        norm_weight, norm_bias: [C], or ``None``: no norm.
    """

    patch: int
    grid: int
    eps: float
    weight: Tensor
    table: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None

    def __call__(self, flow: Flow) -> Flow:
        """Map images [B, H, W, D] to tokens or a map."""
        norm = None
        if self.norm_weight is not None and self.norm_bias is not None:
            norm = Norm(self.norm_weight, self.norm_bias, self.eps)
        _, height, width, _ = flow.x.shape
        x = patch_embedding(flow.x, self.weight, self.table, self.patch, norm=norm)
        if self.grid:
            x = x.unflatten(1, (height // self.patch, width // self.patch))
        return flow.next(x)


def factor_before(weight: Tensor) -> float | None:
    """Return what normalised rows are rounded to e4m3 times; ``None`` before other weights."""
    return norm_factor(weight.shape[1]) if weight.dtype == E4M3 else None


@dataclass(frozen=True)
class TransformerBlock:
    """A block of a vision transformer, whose norms' weights are in the layers after them.

    Where its weights are in e4m3, so are the rows that they multiply; attention and the layer after
    it stay in bf16.

    Attributes:
        heads: of attention.
        scale: of the products of queries and keys.
        eps1, eps2: of the norms.
        qkv_weight, …: of the linear layers, weights [N, C] and biases [N].
        qkv_alpha, fc1_alpha, fc2_alpha: what products in e4m3 are multiplied by.
        hidden_factor: what GELU's result is rounded to e4m3 times.
    """

    heads: int
    scale: float
    eps1: float
    eps2: float
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    qkv_alpha: float = 1.0
    fc1_alpha: float = 1.0
    fc2_alpha: float = 1.0
    hidden_factor: float = 1.0

    def __call__(self, flow: Flow) -> Flow:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        n = shifted_norm(flow.x, flow.shift, self.eps1, factor=factor_before(self.qkv_weight))
        rows = n.view(-1, n.shape[-1])
        qkv = flow.linear("qkv", rows, self.qkv_weight, self.qkv_bias, self.qkv_alpha)
        a = self._attend(qkv.view(*n.shape[:-1], -1), flow)
        flow = flow.add_linear("proj", a, self.proj_weight, self.proj_bias)
        n = shifted_norm(flow.x, flow.shift, self.eps2, factor=factor_before(self.fc1_weight))
        return flow.mlp(n.view(-1, n.shape[-1]), self)

    def _attend(self, qkv: Tensor, flow: Flow) -> Tensor:
        backend = "reference" if flow.choices.attention == "library" else "auto"
        out = qkv_attention(qkv, self.heads, scale=self.scale, backend=backend)
        return out.view(-1, out.shape[-1])


@dataclass(frozen=True)
class ConvNextBlock:
    """A block of ConvNeXt, whose norm's weights and layer scale are in its linear layers.

    Attributes:
        eps: of the norm.
        conv_weight: [49, C].
        conv_bias: [C].
        fc1_weight, …: of the linear layers.
        fc1_alpha, fc2_alpha: what products in e4m3 are multiplied by.
        hidden_factor: what GELU's result is rounded to e4m3 times.
    """

    eps: float
    conv_weight: Tensor
    conv_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    fc1_alpha: float = 1.0
    fc2_alpha: float = 1.0
    hidden_factor: float = 1.0

    def __call__(self, flow: Flow) -> Flow:
        """Map [B, H, W, C] to [B, H, W, C]."""
        bias, shift = self.conv_bias, flow.shift
        if shift is not None:
            size = (flow.x.shape[1], flow.x.shape[2])
            bias = flow.constant("conv", lambda: bias_map(self.conv_weight, bias, shift, size))
        factor = factor_before(self.fc1_weight)
        n = depthwise_norm(flow.x, self.conv_weight, bias, self.eps, factor=factor)
        rows = n.view(-1, n.shape[-1])
        if flow.choices.narrow and n.shape[-1] <= WIDEST and factor is None:
            mlp = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
            x = narrow_mlp(rows, *mlp, flow.rows(), approximate=flow.choices.gelu)
            return replace(flow, x=x.view(n.shape))
        return flow.mlp(rows, self)


def bias_map(weight: Tensor, bias: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute what a depthwise convolution makes of a constant map, and add the bias.

    Args:
        weight: [49, C].
        bias: [C].
        shift: [C], the constant; zero beyond the image.
        size: H and W.

    Returns:
        [H, W, C] fp32.
    """
    rows, cols = (_taps_inside(n, weight.device) for n in size)
    inside = torch.einsum("hi,wj->hwij", rows, cols).flatten(2)
    return inside @ (weight.float() * shift.float()) + bias.float()


def _taps_inside(size: int, device: torch.device) -> Tensor:
    """Tell for every position along a side which of the seven taps meet the image: [size, 7]."""
    place = torch.arange(size, device=device)[:, None] + torch.arange(-3, 4, device=device)
    return ((place >= 0) & (place < size)).float()


@dataclass(frozen=True)
class Downsample:
    """ConvNeXt's norm and strided convolution; the norm's weights are in the convolution's.

    Attributes:
        patch: side of the filters, and their step.
        eps: of the norm.
        weight: [C', P·P·C].
        bias: [C'].
    """

    patch: int
    eps: float
    weight: Tensor
    bias: Tensor

    def __call__(self, flow: Flow) -> Flow:
        """Map [B, H, W, C] to [B, H / P, W / P, C']."""
        _, height, width, _ = flow.x.shape
        n = shifted_norm(flow.x, flow.shift, self.eps)
        x = patch_embedding(n, self.weight, self.bias, self.patch)
        return flow.next(x.unflatten(1, (height // self.patch, width // self.patch)))


@dataclass(frozen=True)
class Tokens:
    """The backbone's end: its norm, and which tokens the adapter gets.

    Attributes:
        first, last: of the tokens; ``last`` 0: all from the first on.
        eps: of the norm.
        weight, bias: [C], or ``None``: no norm.
    """

    first: int
    last: int
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, flow: Flow) -> Flow:
        """Map tokens or a map to tokens [B, N, C]."""
        x = flow.x
        if x.dim() == 4:
            return flow.next(flow.whole().flatten(1, 2))
        x = x[:, self.first : self.last or None]
        if self.weight is None:
            return flow.next(replace(flow, x=x).whole())
        return flow.next(shifted_norm(x, flow.shift, self.eps, self.weight, self.bias))


@dataclass(frozen=True)
class AdapterBlock:
    """A block of CLAdapter; the first one holds the adapter's first norm.

    Attributes:
        eps0, eps1, eps2: of the norms: the adapter's first, and the block's two.
        centers, transforms, down_weight, …: of cluster attention; down and up are ``None`` in token
            mode.
        norm0_weight, …: of norms and linear layers.
    """

    eps0: float
    eps1: float
    eps2: float
    norm1_weight: Tensor
    norm1_bias: Tensor
    centers: Tensor
    transforms: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    norm0_weight: Tensor | None = None
    norm0_bias: Tensor | None = None
    down_weight: Tensor | None = None
    down_bias: Tensor | None = None
    up_weight: Tensor | None = None
    up_bias: Tensor | None = None

    def __call__(self, flow: Flow) -> Flow:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        norm1 = (self.norm1_weight, self.norm1_bias)
        if self.norm0_weight is not None and self.norm0_bias is not None:
            norm0 = (self.norm0_weight, self.norm0_bias)
            n = layer_norm_twice(flow.x, *norm0, *norm1, self.eps0, self.eps1)
        else:
            n = layer_norm(flow.x, *norm1, self.eps1)
        projections = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        x = cluster_attention(n, self.centers, self.transforms, *projections)
        norm2, fc1 = (self.norm2_weight, self.norm2_bias), (self.fc1_weight, self.fc1_bias)
        x = residual_mlp_op(x, *norm2, *fc1, self.fc2_weight, self.fc2_bias, self.eps2)
        return flow.next(x)


@dataclass(frozen=True)
class Head:
    """The end: a norm, the mean over tokens, and a linear layer.

    Attributes:
        eps: of the norm.
        norm_weight, norm_bias: [C], or ``None``: no norm.
        weight, bias: of the linear layer, or ``None``: features leave.
    """

    eps: float
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, flow: Flow) -> Flow:
        """Map tokens [B, N, C] to outputs [B, outputs]."""
        if self.norm_weight is not None and self.norm_bias is not None:
            x = layer_norm_mean(flow.x, self.norm_weight, self.norm_bias, self.eps)
        else:
            x = flow.x.mean(1)
        if self.weight is not None:
            x = F.linear(x, self.weight, self.bias)
        return flow.next(x)


Step = Patches | TransformerBlock | ConvNextBlock | Downsample | Tokens | AdapterBlock | Head
KINDS: dict[str, type] = {
    "patches": Patches,
    "transformer block": TransformerBlock,
    "convnext block": ConvNextBlock,
    "downsample": Downsample,
    "tokens": Tokens,
    "adapter block": AdapterBlock,
    "head": Head,
}
