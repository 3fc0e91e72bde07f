"""A call of cluster attention: its arguments by name, its sizes, and the tensors that it saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..common.dispatch import cast

T = TypeVar("T")

# Which tensors there are depends on the problem, and a plan is made for one problem: what it takes
# and makes is typed as there (Any), not as Tensor | None.


class Arguments(NamedTuple, Generic[T]):
    """One value for each argument: the tensor, its dtype, its gradient, or whether that is needed.

    ``None`` for an argument that is not there.
    """

    x: T
    centers: T
    transforms: T
    down_weight: T
    down_bias: T
    up_weight: T
    up_bias: T


NO_NEEDS: Arguments[bool] = Arguments(*(False,) * 7)


class Problem(NamedTuple):
    """The sizes and dtypes that the plans of a call depend on, beside its block sizes."""

    batch: int
    tokens: int
    width: int
    rank: int  # 0 in token mode
    num_centers: int
    dtypes: Arguments[Any]  # of the arguments; None for those that are not there

    @property
    def fused(self) -> bool:
        """Whether our kernels compute the products; in token mode and in fp32 cuBLAS does."""
        return self.rank > 0 and self.dtypes.x != torch.float32


def problem_of(args: Arguments[Any]) -> Problem:
    """Return the problem that the arguments pose."""
    x, centers = args.x, args.centers
    rank = 0 if args.down_weight is None else args.down_weight.shape[0]
    dtypes = Arguments(*[None if t is None else t.dtype for t in args])
    batch, tokens, width = x.shape
    return Problem(batch, tokens, width, rank, centers.shape[1], dtypes)


def with_weights_in_dtype_of_x(args: Arguments[Any]) -> Arguments[Any]:
    """Cast the weights of both projections to x's dtype."""
    dtype = args.x.dtype
    if args.down_weight is None or args.down_weight.dtype == args.up_weight.dtype == dtype:
        return args
    return args._replace(
        down_weight=cast(args.down_weight, dtype), up_weight=cast(args.up_weight, dtype)
    )


@dataclass
class Saved:
    """The tensors that the forward keeps for the backward, beside its arguments."""

    h: Tensor | None  # [B·N, R]; None in token mode
    mixed: Tensor | None  # T_b [B, R, R], or [B, N, N] in token mode
    state: Tensor | None  # of the attention, packed: a, s, q, |q|, |centers|
    z: Tensor | None  # h @ T_b [B·N, R], if it was asked for

    def take(self) -> tuple[Any, Any, Any, Any]:
        """Return h, T_b, the state and z, and forget them: each is freed once it has been used."""
        h, mixed, state, z = self.h, self.mixed, self.state, self.z
        self.h = self.mixed = self.state = self.z = None
        return h, mixed, state, z


class ProjectionDtypes(NamedTuple):
    """The dtypes of the gradients of both weights; the weights' own where ``None``."""

    down: torch.dtype | None = None
    up: torch.dtype | None = None
