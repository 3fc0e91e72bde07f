"""Run a backbone's convolutions and batch norms without plans of cuDNN, in half precision.

On a GPU cuDNN plans each convolution anew for each size of a batch: a depthwise layer in a tenth of
a second forward and half a second backward, one of single pixels in about 10 ms for each direction.
With our kernels for the first, and products of matrices for the second, the first step of a
training and its last, smaller batch cost what any other costs; products are as fast as cuDNN. A
batch norm that trains is one operation with the activation that timm's modules hold: PyTorch passes
over memory for each of them, forward and backward. No module is changed: calls of ``conv2d`` and
``batch_norm`` are taken over within a context.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastadapt.kernels import batch_norm_act, depthwise_conv2d
from fastadapt.kernels.common.dispatch import compute_dtype

_NOTHING = contextlib.nullcontext()
_HALF = (torch.bfloat16, torch.float16)
_has_convolution: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def image_operators(model: nn.Module, x: Tensor) -> contextlib.AbstractContextManager:
    """Make the context in which ``model(x)`` runs such operators with our kernels.

    Args:
        model: asked whether it has any.
        x: its input; on a CPU, in fp32 and under ``torch.compile`` the context does nothing.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or compute_dtype(x) not in _HALF:
        return _NOTHING
    if model not in _has_convolution:
        _has_convolution[model] = any(
            isinstance(module, nn.Conv2d)
            and (module.groups == module.in_channels > 1 or module.kernel_size == (1, 1))
            for module in model.modules()
        )
    norms = training_norms(model) if torch.is_grad_enabled() else {}
    if not norms and not _has_convolution[model]:
        return _NOTHING
    counters = batch_counters(model) if norms else frozenset()
    return ImageOperators(norms, padded_channels(model), counters)


def padded_channels(model: nn.Module) -> frozenset[int]:
    """Return the channels of depthwise convolutions that pad their input in a step of its own."""
    from timm.layers import Conv2dSame

    return frozenset(
        module.in_channels
        for module in model.modules()
        if isinstance(module, Conv2dSame) and module.groups == module.in_channels
    )


def training_norms(model: nn.Module) -> dict[int, str]:
    """Return the activation after each batch norm that trains, by the id of the norm's weight.

    It is ``"none"`` where the activation is unknown, or a module of its own.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.training and module.affine:
            found[id(module.weight)] = activation_of(module)
    return found


def batch_counters(model: nn.Module) -> frozenset[int]:
    """Return the ids of the tensors in which batch norms that train count batches, and only that.

    Without a momentum the running statistics are a mean over as many batches as were counted.
    """
    return frozenset(
        id(module.num_batches_tracked)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and module.training and module.momentum is not None
    )


def activation_of(norm: nn.BatchNorm2d) -> str:
    """Return the activation after a batch norm, as :func:`training_norms` does."""
    from timm.layers import BatchNormAct2d

    if type(norm) is BatchNormAct2d and isinstance(norm.drop, nn.Identity):
        return _NAMES.get(type(norm.act), "none")
    return "none"


# Of the modules, and of the functions that they call.
_NAMES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
_ACTIVATIONS = (F.relu, F.hardtanh, F.silu)


class ImageOperators(TorchFunctionMode):
    """Take over calls of ``conv2d``, depthwise or of single pixels, and of ``batch_norm``.

    Zeros that are added after the last row and column just before a depthwise convolution are added
    by its kernel: the call of ``pad`` gives memory that is filled only if any other function is
    called next. Batch norms count their batches all at once, when the context ends.

    Args:
        norms: see :func:`training_norms`; valid as long as the context.
        padded: see :func:`padded_channels`.
        counters: see :func:`batch_counters`.
        backend: of the operations.
    """

    def __init__(
        self,
        norms: dict[int, str],
        padded: frozenset[int] = frozenset(),
        counters: frozenset[int] = frozenset(),
        backend: str = "auto",
    ):
        super().__init__()
        self._norms = norms
        self._padded = padded
        self._counters = counters
        self._counted: list[Tensor] = []
        self._backend = backend
        self._activated: Tensor | None = None  # the last norm's output, if it has its activation
        self._pending: _Padded | None = None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        pending, self._pending = self._pending, None
        conv = _Conv2d(*args) if func is torch.conv2d and not kwargs else None
        depthwise = conv.depthwise() if conv is not None else None
        if depthwise is not None:
            return self._convolve(depthwise, pending)
        if pending is not None:
            pending.fill()
        product = conv.product() if conv is not None else None
        if product is not None:
            return product
        if func is F.pad:  # which names its mode and value, whoever called it
            self._pending = _pad_later(self._padded, *args, **kwargs)
            if self._pending is not None:
                return self._pending.result
        if func is F.batch_norm and self._norms:
            call = _norm(*args, **kwargs)
            if call is not None and id(call["weight"]) in self._norms:
                return self._normalize(call)
        if func is Tensor.add_ and id(args[0]) in self._counters and args[1:] == (1,):
            self._counted.append(args[0])
            return args[0]
        if func in _ACTIVATIONS and args and args[0] is self._activated:
            return args[0]
        return func(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        """Fill what nobody has read, and count the batch."""
        super().__exit__(*exception)
        if self._counted:
            torch._foreach_add_(self._counted, 1)
            self._counted = []
        if self._pending is not None:
            self._pending.fill()
            self._pending = None

    def _convolve(self, call: _Depthwise, pending: _Padded | None) -> Tensor:
        if pending is not None and call.x is pending.result and call.padding == 0:
            call = call._replace(
                x=pending.source, padding=pending.before, padding_end=pending.after
            )
        elif pending is not None:
            pending.fill()
        return depthwise_conv2d(**call._asdict(), backend=self._backend)

    def _normalize(self, call: dict[str, Any]) -> Tensor:
        activation = self._norms[id(call["weight"])]
        y = batch_norm_act(**call, activation=activation, backend=self._backend)
        self._activated = None if activation == "none" else y
        return y


class _Conv2d(NamedTuple):
    """A call of ``conv2d``, whose arguments PyTorch gives by their order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    def depthwise(self) -> _Depthwise | None:
        """Return what our operation takes of the call; ``None`` if it is another."""
        x, weight, channels = self.x, self.weight, self.weight.shape[0]
        if not (x.dim() == 4 and self.groups == channels == x.shape[1] > 1):
            return None
        if weight.shape[2] != weight.shape[3] or (x.is_cuda and compute_dtype(x) not in _HALF):
            return None
        step, border = _single(self.stride), _single(self.padding)
        if step is None or border is None or _single(self.dilation) != 1:
            return None
        return _Depthwise(x, weight, self.bias, step, border)

    def product(self) -> Tensor | None:
        """Compute a convolution of single pixels as a product; ``None`` if the call is another.

        With channels last, an image's pixels are the rows of a matrix as they lie in memory.
        """
        x, weight = self.x, self.weight
        if self.groups != 1 or x.dim() != 4 or tuple(weight.shape[2:]) != (1, 1):
            return None
        if _single(self.stride) != 1 or _single(self.padding) != 0:
            return None
        if not x.is_contiguous(memory_format=torch.channels_last):
            return None
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _Depthwise(NamedTuple):
    """What our operation takes."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: int
    padding_end: int | None = None


class _Padded(NamedTuple):
    """Memory for an image with zeros around it, not yet written."""

    result: Tensor
    source: Tensor
    before: int
    after: int

    def fill(self) -> None:
        """Write the image and the zeros."""
        with torch.no_grad():
            padded = F.pad(self.source, (self.before, self.after) * 2)
            self.result.detach().copy_(padded)


class _Unwritten(torch.autograd.Function):
    """Make memory for an image with zeros around it; its gradient is the part within them."""

    @staticmethod
    def forward(ctx, x, before, after):
        ctx.before = before
        ctx.size = x.shape[2:]
        batch, channels, height, width = x.shape
        size = (batch, channels, height + before + after, width + before + after)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, g):
        height, width = ctx.size
        return g[:, :, ctx.before :, ctx.before :][:, :, :height, :width], None, None


def _pad_later(
    channels: frozenset[int], input: Tensor, pad: Any, mode: str = "constant", value: Any = None
) -> _Padded | None:
    """Take a call of ``pad`` that may precede a depthwise convolution; ``None`` for others."""
    x = input
    if x.dim() != 4 or x.shape[1] not in channels or mode != "constant" or value:
        return None
    if len(pad) != 4 or tuple(pad[:2]) != tuple(pad[2:]) or min(pad) < 0:
        return None
    before, after = pad[:2]
    return _Padded(_Unwritten.apply(x, before, after), x, before, after)


def _norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any] | None:
    """Return what our operation takes of a call of ``batch_norm``; ``None`` if it is another."""
    if not training or input.dim() != 4 or weight is None or bias is None:
        return None
    if input.numel() <= weight.numel() or input.numel() >= 2**31 * weight.numel():
        return None
    if (running_mean is None) != (running_var is None):
        return None
    return {
        "x": input,
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "momentum": momentum,
        "eps": eps,
    }


def _single(value: Any) -> int | None:
    """Return the number that both axes have; ``None`` if they differ, or it is a word."""
    if isinstance(value, int):
        return value
    if isinstance(value, tuple | list) and len(set(value)) == 1 and isinstance(value[0], int):
        return value[0]
    return None
