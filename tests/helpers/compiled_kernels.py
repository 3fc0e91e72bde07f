"""Compile every kernel that a call launches, for GPUs that are not there.

The operations run on CPU tensors and are told that the device is a GPU of some compute capability;
Triton is told the same. A launch compiles its kernel to PTX and goes no further, so that results
are whatever was in memory. Matrix products that PyTorch would compute are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastadapt.kernels
from tests.helpers.unfinished_products import products_left_reading

for _module in pkgutil.walk_packages(fastadapt.kernels.__path__, "fastadapt.kernels."):
    importlib.import_module(_module.name)

try:
    from fastadapt.kernels.common import dispatch, launcher
except ImportError:  # before the folders
    from fastadapt.kernels import dispatch
    from fastadapt.kernels import launch as launcher

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Compute capability: multiprocessors and bytes of shared memory that a program can have.
GPUS = {
    80: (108, 166_912),  # A100
    86: (84, 101_376),  # RTX 3090
    89: (128, 101_376),  # RTX 4090, L4
    90: (132, 232_448),  # H100, H200
    100: (148, 232_448),  # B200
    120: (170, 101_376),  # RTX 5090
}


@dataclass(frozen=True)
class Compiled:
    """One launch: its grid, the numbers it passes, and its kernel as compiled."""

    kernel: str
    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    shared: int  # bytes
    ptx: str  # normalized
    unfinished: int  # products that may still read registers when these are written again


class _Driver:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # a number of its own: Triton keeps what is compiled by it

    def get_current_stream(self, device):
        return 0


class _NoProducts(TorchDispatchMode):
    """Leaves out matrix products, which take seconds on a CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("addmm_", "baddbmm_"):
            return args[0]
        if name in ("mm", "bmm", "addmm", "baddbmm") and "out" not in kwargs:
            left, right = [t for t in args if isinstance(t, Tensor)][-2:]
            shape = (*left.shape[:-1], right.shape[-1])
            return torch.empty(shape, dtype=kwargs.get("out_dtype", left.dtype))
        return func(*args, **kwargs)


@contextlib.contextmanager
def replaced(original: Callable, new: Callable) -> Iterator[None]:
    """Replaces a function of ``kernels/`` wherever it is bound."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastadapt.kernels"):
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        stack.enter_context(mock.patch.object(module, attribute, new))
        yield


def compiled(
    call: Callable[[], None],
    capability: int,
    *,
    cache: Path,
    assemble: bool = False,
    target: int | None = None,
) -> list[Compiled]:
    """Compile the kernels that ``call`` launches.

    Args:
        call: calls operations with CPU tensors and ``backend="triton"``.
        capability: the compute capability, times ten.
        cache: folder for what Triton keeps: what ends at PTX must not lie where others look.
        assemble: have ptxas make machine code, too, which finds what the GPU cannot do.
        target: the compute capability that is compiled for, if another of the same generation:
            what was compiled for it before, with the same constants, is not compiled again.

    Returns:
        A :class:`Compiled` for each launch, in order.
    """
    multiprocessors, shared = GPUS[capability]
    # Without an index: tensors are made on the CPU and nothing compiles ahead.
    device = launcher.Device(None, multiprocessors, shared, capability // 10)
    launches = []
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        constexpr = [p.is_constexpr for p in self.params]
        numbers = [
            value
            for value, is_constant in zip(args, constexpr, strict=False)
            # Triton makes a constant of 1.
            if not is_constant and isinstance(value, int | float) and value != 1
        ]
        ptx = normalized(kernel.asm["ptx"])
        shared = kernel.metadata.shared
        name = self.fn.__name__
        unfinished = products_left_reading(kernel.asm.get("ttgir", ""))
        launches.append(Compiled(name, tuple(grid), tuple(numbers), shared, ptx, unfinished))
        return kernel

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(cache)))
        if not assemble:
            stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", lambda *args: b""))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_instead))
        stack.enter_context(replaced(launcher.device_of, lambda index: device))
        stack.enter_context(replaced(dispatch.why_not_device, lambda x: None))
        stack.enter_context(mock.patch.object(knobs.compilation, "disable_line_info", True))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(target or capability)))
        stack.enter_context(_NoProducts())
        call()
    return launches


def normalized(ptx: str) -> str:
    """Take comments, line information and chosen names out of PTX."""
    ptx = re.sub(r"\s*//.*", "", ptx)
    ptx = re.sub(r"^\s*\.(loc|file)\b.*\n", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^\$L__(tmp|func_begin|func_end)\w*:\n", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"\n\s*\.section\s+\.debug.*?\n\s*}", "", ptx, flags=re.DOTALL)
    names = re.findall(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)", ptx)
    for i, name in enumerate(dict.fromkeys(names)):
        ptx = re.sub(rf"(?<![\w$]){re.escape(name)}(?![A-Za-z0-9$])", f"function{i}", ptx)
        ptx = re.sub(rf"(?<![\w$]){re.escape(name)}_param", f"function{i}_param", ptx)
    return re.sub(r"\n\s*\n+", "\n", ptx).strip() + "\n"


# The grid of calls: an operation below, its arguments and its options.

Call = tuple[Callable[..., None], tuple, dict]


def _step(function: Callable, args: list, needs: list[bool] | None = None, **options) -> None:
    """Forward, and backward where any argument needs a gradient."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    needs = [True] * len(tensors) if needs is None else needs
    asked = []
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
        if need:
            asked.append(t)
    y = function(*args, backend="triton", **options)
    if asked:
        torch.autograd.grad(y, asked, torch.empty_like(y))


def _internal(name: str) -> Callable:
    """Find an operation that is not public, wherever it lives."""
    modules = [m for n, m in sys.modules.items() if n.startswith("fastadapt.kernels.")]
    return next(vars(module)[name] for module in modules if name in vars(module))


def cluster_attention(
    b, n, c, r, k, dtype, params=None, *, biases=True, needs=None, training=True, restore_z=False
):
    """A call of cluster attention; token mode with r = 0.

    Args:
        params: dtype of all but x and the two weights.
        needs: which arguments need gradients.
        training: else no gradients.
        restore_z: the backward of the operator for ``torch.compile``, without z.
    """
    params = params or dtype
    args = [
        torch.empty(b, n, c, dtype=dtype),
        torch.empty(c, k, dtype=params),
        torch.empty(k, r or n, r or n, dtype=params),
    ]
    if r:
        down_bias = torch.empty(r, dtype=params) if biases else None
        up_bias = torch.empty(c, dtype=params) if biases else None
        args += [torch.empty(r, c, dtype=dtype), down_bias]
        args += [torch.empty(c, r, dtype=dtype), up_bias]
    if restore_z:
        y, *saved = torch.ops.fastadapt.cluster_attention(*args, False)
        g = torch.empty_like(y)
        torch.ops.fastadapt.cluster_attention_backward(g, [True] * 7, *args, saved)
        return
    if not training:
        needs = [False] * sum(t is not None for t in args)
    _step(fastadapt.kernels.cluster_attention, args, needs)


def mixed_transforms(b, c, k, size, dtype):
    """Attention and mixing as exported programs hold them."""
    sums = torch.empty(b, c, dtype=FP32)
    args = (torch.empty(c, k, dtype=dtype), torch.empty(k, size, dtype=dtype))
    torch.ops.fastadapt.mixed_transforms(sums, *args, 49)


def quaternion_linear(
    m, i, o, dtype, params=None, *, groups=None, bias=True, needs=None, training=True, **form
):
    """A call of a quaternion linear layer; ``form``: rotation, scale, zero_half."""
    params = params or dtype
    leading = () if groups is None else (groups,)
    x = torch.empty(*leading, m, (2 if form.get("zero_half") else 4) * i, dtype=dtype)
    weights = [torch.empty(*leading, i, o, dtype=params) for _ in range(4)]
    args = [x, *weights, torch.empty(*leading, 4 * o, dtype=params) if bias else None]
    if form.get("scale"):
        form["scale"] = torch.empty(*leading, i, o, dtype=params).requires_grad_(training)
    if not training:
        needs = [False] * sum(t is not None for t in args)
    _step(fastadapt.kernels.quaternion_linear, args, needs, **form)


def _norm(
    name: str, m, n, c, x_dtype, params=None, *, vectors=2, needs=None, sliced=False, **options
):
    x = torch.empty(m, n + sliced, c, dtype=x_dtype)
    if sliced:
        x = x[:, 1:].detach()
    args = [x, *(torch.empty(c, dtype=params or x_dtype) for _ in range(vectors))]
    _step(getattr(fastadapt.kernels, name), args, needs, **options)


def layer_norm(*args, **options):
    """A call of layer norm."""
    _norm("layer_norm", *args, **options)


def layer_norm_twice(*args, **options):
    """A call of two layer norms in a row."""
    _norm("layer_norm_twice", *args, vectors=4, **options)


def layer_norm_mean(*args, **options):
    """A call of layer norm and the mean over tokens."""
    _norm("layer_norm_mean", *args, **options)


def add_layer_norm(m, c, dtype, params=None, out=None):
    """A call of addition and layer norm, which has no gradient."""
    operation = _internal("add_layer_norm")
    x, branch = torch.empty(m, c, dtype=dtype), torch.empty(m, c, dtype=dtype)
    vectors = [torch.empty(c, dtype=params or dtype) for _ in range(2)]
    with torch.no_grad():
        operation(x, branch, *vectors, 1e-5, out or dtype, backend="triton")


def residual_mlp(m, c, hidden, dtype, params=None, *, needs=None, training=True):
    """A call of a residual MLP."""
    params = params or dtype
    args = [torch.empty(m, c, dtype=dtype), torch.empty(c, dtype=params)]
    args += [torch.empty(c, dtype=params), torch.empty(hidden, c, dtype=dtype)]
    args += [torch.empty(hidden, dtype=params), torch.empty(c, hidden, dtype=dtype)]
    args += [torch.empty(c, dtype=params)]
    _step(fastadapt.kernels.residual_mlp, args, needs if training else [False] * 7)


def linear_gelu(m, c, hidden, dtype):
    """A call of a linear layer and GELU, which has no gradient."""
    operation = _internal("linear_gelu")
    shapes = ((m, c), (hidden, c), (hidden,))
    with torch.no_grad():
        operation(*(torch.empty(shape, dtype=dtype) for shape in shapes), backend="triton")


def depthwise_conv2d(b, c, height, width, k, stride, padding, dtype, params=None):
    """A call of a depthwise convolution with a bias."""
    args = [torch.empty(b, c, height, width, dtype=dtype)]
    args += [torch.empty(c, 1, k, k, dtype=params or dtype), torch.empty(c, dtype=params or dtype)]
    function = fastadapt.kernels.depthwise_conv2d
    _step(lambda *a, backend: function(*a, stride, padding, backend=backend), args)


def qkv_attention(b, n, heads, size, dtype):
    """A call of self-attention of a packed product."""
    from fastadapt.kernels.qkv_attention.op import qkv_attention

    with torch.no_grad():
        qkv_attention(torch.empty(b, n, 3 * heads * size, dtype=dtype), heads, backend="triton")


def depthwise_norm(b, height, width, c, dtype, *, result=None):
    """A call of a depthwise convolution with normalisation."""
    from fastadapt.kernels.depthwise_norm.op import depthwise_norm

    x, weight = torch.empty(b, height, width, c, dtype=dtype), torch.empty(49, c, dtype=dtype)
    depthwise_norm(x, weight, torch.empty(c), dtype=result, backend="triton")


def patch_embedding(b, side, c, patch, outputs, dtype, *, prefix=0, norm=False):
    """A call of a product with patches, of bytes where there are three channels."""
    from fastadapt.kernels.patch_embedding.checks import Norm
    from fastadapt.kernels.patch_embedding.op import patch_embedding

    x = torch.empty(b, side, side, c, dtype=torch.uint8 if c == 3 else dtype)
    weight = torch.empty(outputs, patch * patch * c, dtype=dtype)
    tokens = prefix + (side // patch) ** 2
    table = torch.empty(tokens, outputs) if prefix else torch.empty(outputs)
    norms = Norm(torch.empty(outputs), torch.empty(outputs), 1e-6) if norm else None
    patch_embedding(x, weight, table, patch, norm=norms, backend="triton")


def shifted_norm(m, c, dtype):
    """A call of a norm of shifted rows."""
    from fastadapt.kernels.shifted_norm.op import shifted_norm

    shifted_norm(torch.empty(m, c, dtype=dtype), torch.empty(c), 1e-6, backend="triton")


def narrow_mlp(m, c, hidden, dtype, *, sums=None):
    """A call of an MLP of few channels."""
    from fastadapt.kernels.narrow_mlp.op import narrow_mlp

    x, fc1 = torch.empty(m, c, dtype=dtype), torch.empty(hidden, c, dtype=dtype)
    fc2, residual = torch.empty(c, hidden, dtype=dtype), torch.empty(m, c, dtype=sums or dtype)
    narrow_mlp(x, fc1, torch.empty(hidden), fc2, torch.empty(c), residual, backend="triton")


def _only(*numbers: int, of: int = 7) -> list[bool]:
    return [i in numbers for i in range(of)]


def calls(*, small: bool = False, few: bool = False) -> dict[str, Callable[[], None]]:
    """Return the calls whose kernels are compiled, by name.

    Args:
        small: those that between them launch every kernel, else many sizes, dtypes and forms.
        few: those with the largest kernels of each operation.
    """
    chosen = _FEW if few else _FEW + _SMALL if small else _FEW + _SMALL + _MORE
    named = {}
    for operation, args, options in chosen:
        described = [str(a).removeprefix("torch.") for a in args]
        described += [f"{key}={value}" for key, value in options.items()]
        name = f"{operation.__name__}({', '.join(described)})"
        assert name not in named, name
        named[name] = lambda f=operation, a=args, o=options: f(*a, **o)
    return named


_FEW: list[Call] = [
    (cluster_attention, (64, 197, 768, 256, 20, BF16), {}),  # Hopper's kernels, two groups
    (quaternion_linear, (8, 64, 64, BF16), {}),
    (quaternion_linear, (4096, 256, 128, BF16), {}),  # Hopper's kernel
    (layer_norm, (8, 197, 768, BF16), {}),
    (layer_norm_twice, (8, 197, 768, BF16), {}),
    (layer_norm_mean, (8, 197, 768, BF16), {}),
    (residual_mlp, (12608, 768, 3072, BF16), {}),  # Hopper's kernel
    (patch_embedding, (64, 224, 3, 16, 768, BF16), {"prefix": 1}),
    (narrow_mlp, (25088, 128, 512, BF16), {}),
    (qkv_attention, (8, 197, 12, 64, BF16), {}),
]

_SMALL: list[Call] = [
    (cluster_attention, (256, 49, 512, 128, 20, FP16, FP32), {}),  # a sample for each group
    (cluster_attention, (1, 197, 768, 64, 20, BF16), {}),
    (cluster_attention, (2, 33, 63, 60, 33, BF16), {}),  # padded
    (cluster_attention, (8, 197, 768, 256, 20, FP32), {}),
    (cluster_attention, (8, 196, 384, 0, 20, BF16), {}),
    (mixed_transforms, (8, 512, 20, 128 * 128, FP32), {}),
    (quaternion_linear, (33, 63, 30, FP16), {"groups": 2, "rotation": True, "scale": True}),
    (quaternion_linear, (4096, 256, 128, FP16, FP32), {"zero_half": True}),
    (quaternion_linear, (20, 33, 17, FP32), {"zero_half": True}),
    (layer_norm, (3, 17, 1000, FP32), {}),
    (add_layer_norm, (1576, 768, FP32, FP32, BF16), {}),
    (residual_mlp, (1000, 384, 1536, BF16), {}),
    (residual_mlp, (700, 63, 65, FP32), {}),
    (linear_gelu, (12608, 768, 3072, FP16), {}),
    (depthwise_conv2d, (10, 16, 28, 28, 7, 3, 6, FP16, FP32), {}),
    (depthwise_norm, (64, 14, 14, 512, BF16), {}),
    (patch_embedding, (64, 224, 3, 4, 128, BF16), {"norm": True}),
    (patch_embedding, (64, 28, 256, 2, 512, FP16), {}),
    (shifted_norm, (12608, 768, BF16), {}),
]

_MORE: list[Call] = [
    (narrow_mlp, (25088, 128, 512, BF16), {"sums": FP32}),
    (depthwise_norm, (64, 56, 56, 128, FP32), {"result": BF16}),
    (cluster_attention, (40, 197, 768, 64, 20, FP16), {}),  # one group
    (cluster_attention, (127, 197, 768, 128, 20, BF16), {}),  # three groups
    (cluster_attention, (127, 197, 1024, 256, 100, BF16, FP32), {}),
    (cluster_attention, (64, 197, 768, 256, 20, BF16), {"biases": False}),
    (cluster_attention, (64, 197, 768, 256, 20, BF16), {"training": False}),
    (cluster_attention, (64, 197, 768, 256, 20, BF16), {"needs": _only(0)}),
    (cluster_attention, (64, 197, 768, 256, 20, BF16), {"needs": _only(1, 4)}),
    (cluster_attention, (64, 197, 768, 256, 20, BF16), {"needs": _only(2, 3)}),
    (cluster_attention, (64, 197, 768, 256, 20, BF16), {"needs": _only(5, 6)}),
    (cluster_attention, (64, 197, 768, 256, 20, BF16), {"restore_z": True}),
    (cluster_attention, (256, 49, 1024, 256, 20, BF16), {"restore_z": True}),
    (cluster_attention, (1000, 16, 384, 64, 20, FP16), {}),
    (cluster_attention, (1, 49, 768, 256, 20, FP16), {}),
    (cluster_attention, (1, 197, 768, 256, 20, BF16), {"training": False}),
    (cluster_attention, (8, 197, 768, 256, 20, BF16, FP32), {}),
    (cluster_attention, (16, 197, 384, 96, 20, BF16), {}),
    (cluster_attention, (64, 197, 768, 96, 20, FP16), {}),
    (cluster_attention, (32, 197, 768, 512, 20, FP16), {}),
    (cluster_attention, (300, 3, 40, 96, 3, BF16), {}),  # short samples
    (cluster_attention, (5, 1, 40, 16, 4, FP16), {}),
    (cluster_attention, (1, 130, 63, 300, 2, FP16), {}),
    (cluster_attention, (8, 512, 320, 64, 128, BF16), {}),
    (cluster_attention, (64, 49, 512, 128, 20, FP32), {"biases": False}),
    (cluster_attention, (64, 49, 512, 128, 20, FP32), {"needs": _only(1, 2)}),
    (cluster_attention, (32, 49, 1024, 0, 20, FP32), {}),
    (cluster_attention, (3, 17, 40, 0, 4, FP16), {}),
    (mixed_transforms, (200, 768, 20, 64 * 64, BF16), {}),
    (quaternion_linear, (8, 64, 64, BF16), {"bias": False}),
    (quaternion_linear, (64, 192, 192, FP16, FP32), {}),
    (quaternion_linear, (300, 64, 256, BF16), {"rotation": True, "zero_half": True}),
    (quaternion_linear, (8, 30, 63, BF16), {"groups": 2, "zero_half": True}),
    (quaternion_linear, (600, 250, 128, BF16), {}),
    (quaternion_linear, (3000, 250, 120, FP16), {}),
    (quaternion_linear, (600, 128, 128, FP32), {}),
    (quaternion_linear, (600, 128, 128, FP32), {"rotation": True}),
    (quaternion_linear, (130, 512, 576, BF16), {}),
    (quaternion_linear, (12544, 192, 192, BF16, FP32), {}),
    (quaternion_linear, (25088, 256, 256, FP16), {"training": False}),
    (quaternion_linear, (4096, 256, 128, BF16), {"bias": False}),
    (quaternion_linear, (4096, 256, 128, BF16), {"needs": _only(0, of=6)}),
    (quaternion_linear, (4096, 256, 128, BF16), {"needs": _only(1, 2, 3, 4, of=6)}),
    (quaternion_linear, (4096, 256, 128, BF16), {"needs": _only(5, of=6)}),
    (quaternion_linear, (4096, 256, 128, BF16), {"needs": _only(1, 5, of=6)}),
    (quaternion_linear, (700, 320, 256, FP16), {"zero_half": True}),
    (layer_norm, (128, 197, 768, BF16, FP32), {"dtype": FP32}),
    (layer_norm, (8, 197, 1024, FP16), {"sliced": True}),
    (layer_norm, (1, 5, 8, FP32), {}),
    (layer_norm, (2, 30, 8192, BF16), {}),
    (layer_norm, (8, 197, 768, BF16), {"needs": _only(0, of=3)}),
    (layer_norm, (8, 197, 768, BF16), {"needs": _only(1, 2, of=3)}),
    (layer_norm, (8, 197, 768, BF16), {"needs": _only(of=3)}),
    (layer_norm_twice, (64, 197, 384, FP32), {}),
    (layer_norm_twice, (64, 197, 1024, FP16, FP32), {"dtype": FP16}),
    (layer_norm_twice, (3, 17, 1000, BF16), {"needs": _only(0, of=5)}),
    (layer_norm_twice, (3, 17, 1000, BF16), {"needs": _only(of=5)}),
    (layer_norm_mean, (128, 49, 1024, FP16, FP32), {}),
    (layer_norm_mean, (3, 17, 1000, FP32), {}),
    (layer_norm_mean, (8, 197, 768, BF16), {"needs": _only(of=3)}),
    (add_layer_norm, (100, 1000, BF16), {}),
    (residual_mlp, (12608, 384, 1536, FP16, FP32), {}),
    (residual_mlp, (12608, 768, 3072, BF16), {"training": False}),
    (residual_mlp, (12608, 768, 3072, BF16), {"needs": _only(0)}),
    (residual_mlp, (12608, 768, 3072, BF16), {"needs": _only(3, 5)}),
    (residual_mlp, (1000, 384, 1536, BF16), {"training": False}),
    (residual_mlp, (1000, 384, 1536, FP16), {"needs": _only(1, 2, 4, 6)}),
    (linear_gelu, (100, 384, 1536, FP32), {}),
]
