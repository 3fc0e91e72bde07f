"""Multiply features by learned quaternions: a linear layer with a quarter of the weights.

With x = [x_r | x_i | x_j | x_k] [..., 4·I], weights W_r … W_k [I, O] and a bias [4·O]:

    (1) y_r = x_r·W_r − x_i·W_i − x_j·W_j − x_k·W_k + b_r        [..., O]
    (2) y_i = x_r·W_i + x_i·W_r − x_j·W_k + x_k·W_j + b_i        [..., O]
    (3) y_j = x_r·W_j + x_i·W_k + x_j·W_r − x_k·W_i + b_j        [..., O]
    (4) y_k = x_r·W_k − x_i·W_j + x_j·W_i + x_k·W_r + b_k        [..., O]

The rotation form, the zero half and the groups are defined with the operation,
:func:`fastadapt.kernels.quaternion_linear`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.kernels import quaternion_linear, quaternion_matrix

COMPONENTS = ("r", "i", "j", "k")


class QuaternionLinear(nn.Module):
    """Apply a linear layer over quaternions: nn.Linear's shapes with a quarter of its weights.

    Args:
        in_features: 4·I, components r, i, j, k side by side.
        out_features: 4·O.
        bias: adds a bias [4·O].
        rotation: rotate by the normalised weights instead of multiplying with them; the real
            quarter of the output is then the bias alone.
        scale: a learned factor [I, O] on the rotation's entries; needs ``rotation``.
        init: scale of the weights, ``"he"`` or ``"glorot"``.
        generator: source of the initial weights, the default generator if ``None``.
        zero_half: the input is the components j and k alone, half of ``in_features``; r and i are
            zero. Weights and state dicts are the same as without.
        groups: this many independent layers in one call; every weight gets a first dimension.

    Shape:
        [..., 4·I] to [..., 4·O]; [..., 2·I] with ``zero_half``; [G, ..., 4·I] with ``groups``.

    Upstream's state dicts load as they are (``r_weight`` … ``bias``, ``scale_param``; the constant
    ``zero_kernel`` is accepted and dropped).

    Raises:
        ValueError: a width is no positive multiple of 4, ``scale`` without ``rotation``, or
            ``groups`` below 1.

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
        zero_half: bool = False,
        groups: int | None = None,
    ):
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if width < 4 or width % 4:
                raise InputError(f"{name} is {width}; expected a positive multiple of 4")
        if scale and not rotation:
            raise InputError("scale=True belongs to the rotation form: pass rotation=True with it")
        if init not in ("he", "glorot"):
            raise InputError(f"init is {init!r}; expected 'he' or 'glorot'")
        if groups is not None and groups < 1:
            raise InputError(f"groups is {groups}; expected at least 1, or None")
        self.in_features = in_features
        self.out_features = out_features
        self.rotation = rotation
        self.init = init
        self.zero_half = zero_half
        self.groups = groups
        leading = () if groups is None else (groups,)
        shape = (*leading, in_features // 4, out_features // 4)
        self.r_weight = nn.Parameter(torch.empty(shape))
        self.i_weight = nn.Parameter(torch.empty(shape))
        self.j_weight = nn.Parameter(torch.empty(shape))
        self.k_weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(*leading, out_features)) if bias else None
        self.scale_param = nn.Parameter(torch.empty(shape)) if scale else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw random quaternions: modulus chi(4) scaled by s, a random unit axis, a uniform phase.

        s is 1/sqrt(2·I) for ``"he"`` and 1/sqrt(2·(I + O)) for ``"glorot"``; the bias is zero.
        """
        shape = self.r_weight.shape
        *_, rows, cols = shape
        s = 1 / math.sqrt(2 * (rows if self.init == "he" else rows + cols))

        def uniform(low: float, high: float) -> Tensor:
            drawn = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
            return low + (high - low) * drawn

        device = self.r_weight.device if generator is None else generator.device
        normal = torch.randn(4, *shape, dtype=torch.float64, generator=generator, device=device)
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
                # xavier_uniform_'s bound, which it would compute wrongly from a tensor with groups.
                bound = math.sqrt(6 / (rows + cols))
                self.scale_param.uniform_(-bound, bound, generator=generator)

    def dense_matrix(self) -> Tensor:
        """Return the matrix that the layer multiplies its input with, from the right.

        Its shape is [4·I, 4·O]; [2·I, 4·O] with ``zero_half``; [G, …] with ``groups``.
        """
        return quaternion_matrix(
            self.r_weight,
            self.i_weight,
            self.j_weight,
            self.k_weight,
            rotation=self.rotation,
            scale=self.scale_param,
            zero_half=self.zero_half,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., 4·I] to [..., 4·O]; see the class for ``zero_half`` and ``groups``."""
        return quaternion_linear(
            x,
            self.r_weight,
            self.i_weight,
            self.j_weight,
            self.k_weight,
            self.bias,
            rotation=self.rotation,
            scale=self.scale_param,
            zero_half=self.zero_half,
        )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A constant of zeros that upstream keeps as a parameter.
        state_dict.pop(prefix + "zero_kernel", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Describe the sizes and the form for ``repr``."""
        form = "rotation" if self.rotation else "hamilton"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, form={form}, scale={self.scale_param is not None}, "
            f"zero_half={self.zero_half}, groups={self.groups}"
        )
