"""Quaternion linear layers as a module."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastadapt.kernels import quaternion_linear, quaternion_matrix

COMPONENTS = ("r", "i", "j", "k")


class QuaternionLinear(nn.Module):
    """A linear layer over quaternions: the outputs of nn.Linear, a quarter of the weights.

    Args:
        in_features: 4·I, components r, i, j, k side by side.
        out_features: 4·O.
        bias: adds a bias [4·O].
        rotation: rotates by the normalised weights instead of multiplying with them; the real
            quarter of the output is then the bias alone.
        scale: a learned factor [I, O] on the rotation's entries; needs ``rotation``.
        init: scale of the weights, ``"he"`` or ``"glorot"``.
        generator: source of the initial weights, the default generator if ``None``.

    Shape:
        [..., 4·I] to [..., 4·O].

    Upstream's state dicts load as they are (``r_weight`` … ``bias``, ``scale_param``; the constant
    ``zero_kernel`` is accepted and dropped).

    Raises:
        ValueError: a width is no positive multiple of 4, or ``scale`` without ``rotation``.

    Source: GDPL (Cao et al.), quaternion networks; upstream ``QuaternionLinear`` and
    ``QuaternionLinearAutograd``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rotation: bool = False,
        scale: bool = False,
        init: Literal["he", "glorot"] = "he",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if width < 4 or width % 4:
                raise ValueError(f"{name} is {width}; expected a positive multiple of 4")
        if scale and not rotation:
            raise ValueError("scale=True belongs to the rotation form: pass rotation=True with it")
        if init not in ("he", "glorot"):
            raise ValueError(f"init is {init!r}; expected 'he' or 'glorot'")
        self.in_features = in_features
        self.out_features = out_features
        self.rotation = rotation
        self.init = init
        shape = (in_features // 4, out_features // 4)
        self.r_weight = nn.Parameter(torch.empty(shape))
        self.i_weight = nn.Parameter(torch.empty(shape))
        self.j_weight = nn.Parameter(torch.empty(shape))
        self.k_weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.scale_param = nn.Parameter(torch.empty(shape)) if scale else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random quaternions: modulus chi(4) scaled by s, a random unit axis, a uniform phase.

        s is 1/sqrt(2·I) for ``"he"`` and 1/sqrt(2·(I + O)) for ``"glorot"``; the bias is zero.
        """
        rows, cols = self.r_weight.shape
        s = 1 / math.sqrt(2 * (rows if self.init == "he" else rows + cols))

        def uniform(low: float, high: float) -> Tensor:
            drawn = torch.rand(rows, cols, dtype=torch.float64, generator=generator, device=device)
            return low + (high - low) * drawn

        device = self.r_weight.device if generator is None else generator.device
        normal = torch.randn(4, rows, cols, dtype=torch.float64, generator=generator, device=device)
        modulus = s * normal.square().sum(0).sqrt()
        axis = torch.stack([uniform(-1, 1) for _ in range(3)])
        axis = axis / (axis.square().sum(0) + 1e-4).sqrt()
        phase = uniform(-math.pi, math.pi)
        with torch.no_grad():
            self.r_weight.copy_(modulus * phase.cos())
            self.i_weight.copy_(modulus * axis[0] * phase.sin())
            self.j_weight.copy_(modulus * axis[1] * phase.sin())
            self.k_weight.copy_(modulus * axis[2] * phase.sin())
            if self.bias is not None:
                self.bias.zero_()
            if self.scale_param is not None:
                nn.init.xavier_uniform_(self.scale_param, generator=generator)

    def dense_matrix(self) -> Tensor:
        """The matrix [4·I, 4·O] that the layer multiplies its input with, from the right."""
        weights = (self.r_weight, self.i_weight, self.j_weight, self.k_weight)
        return quaternion_matrix(*weights, rotation=self.rotation, scale=self.scale_param)

    def forward(self, x: Tensor) -> Tensor:
        return quaternion_linear(
            x,
            self.r_weight,
            self.i_weight,
            self.j_weight,
            self.k_weight,
            self.bias,
            rotation=self.rotation,
            scale=self.scale_param,
        )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A constant of zeros that upstream keeps as a parameter.
        state_dict.pop(prefix + "zero_kernel", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        form = "rotation" if self.rotation else "hamilton"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, form={form}, scale={self.scale_param is not None}"
        )
