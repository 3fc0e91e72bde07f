"""cuBLASLt's products, called directly: PyTorch offers few of their epilogues, and no choice.

The library is the one that PyTorch has loaded. It holds matrices by columns, so that a result
[M, N] by rows is its D [N, M], of A = W and B = x. The numbers that stand for attributes, types and
epilogues are those of ``cublasLt.h`` and ``library_types.h``, the same in CUDA 12 and 13.

Of the algorithms that cuBLASLt proposes, the one that it puts first is up to 15 % slower than the
fastest (fc1 of ViT-B/16 in e4m3 for 256 images on an H100: 279 µs and 244): each product times its
proposals once.

Source: NVIDIA, cuBLAS documentation, "cublasLtMatmul()" and its table of FP8 kernels.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.e4m3 import E4M3
from .checks import Epilogue, half_of

COMPUTE_32F, R_32F = 68, 0
# cudaDataType
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, E4M3: 28}
TRANSPOSED = 1  # CUBLAS_OP_T
TRANS_A, EPILOGUE, BIAS_POINTER, D_SCALE_POINTER, FAST_ACCUM, BIAS_TYPE = 3, 7, 8, 20, 25, 26
DEFAULT, BIAS, GELU = 1, 4, 32  # epilogues; the two latter are bits
WORKSPACE_BYTES = 1  # of a preference
LARGEST_WORKSPACE = 32 << 20  # bytes: what NVIDIA recommends for Hopper
PROPOSALS = 8
TIMED_CALLS = 4


class _Proposal(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Problem(NamedTuple):
    """What a product is prepared for.

    Attributes:
        rows, outputs, inputs: M, N and K.
        dtype: of both operands.
        out: dtype of the result, and of what is added to.
        bias, gelu, adds: what the epilogue does.
        device: number of the GPU.
    """

    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype
    out: torch.dtype
    bias: bool
    gelu: bool
    adds: bool
    device: int

    @property
    def wide(self) -> torch.dtype:
        """Return the dtype of the bias, and of what is added to: the result's, bf16 for e4m3."""
        return half_of(self.out)


class Operands(NamedTuple):
    """One call's tensors and number.

    Attributes:
        factor: a number on the GPU.
        out: the memory of the result; ``None``: new memory.
    """

    x: Tensor
    weight: Tensor
    alpha: float
    bias: Tensor | None
    factor: Tensor | None
    residual: Tensor | None
    out: Tensor | None


class NoKernelError(RuntimeError):
    """There is no cuBLASLt, or it has no kernel for a product."""


@functools.cache
def library() -> Any:
    """Return cuBLASLt, as PyTorch has loaded it.

    Raises:
        NoKernelError: it has loaded none.
    """
    major = (torch.version.cuda or "12").split(".")[0]
    try:
        found = ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError as error:
        raise NoKernelError(f"cuBLASLt: {error}") from error
    pointer = ctypes.c_void_p
    found.cublasLtMatmul.argtypes = [*(pointer,) * 14, ctypes.c_size_t, pointer]
    found.cublasLtGetStatusName.restype = ctypes.c_char_p
    return found


def _check(status: int, what: str) -> None:
    if status:
        name = library().cublasLtGetStatusName(status).decode()
        raise RuntimeError(f"cuBLASLt: {what}: {name}")


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    """Return cuBLASLt's handle for a GPU, which is the current one."""
    handle = ctypes.c_void_p()
    _check(library().cublasLtCreate(ctypes.byref(handle)), "create a handle")
    return handle


class Product:
    """One product, prepared: descriptors and the algorithms that cuBLASLt proposes, best first.

    Raises:
        NoKernelError: cuBLASLt has no kernel for it.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.lock = threading.Lock()
        self.description = self._describe()
        self.a = self._layout(problem.dtype, problem.inputs, problem.outputs)
        self.b = self._layout(problem.dtype, problem.inputs, problem.rows)
        # The type of what is added is also asked for where nothing is.
        self.c = self._layout(problem.wide, problem.outputs, problem.rows)
        self.d = self._layout(problem.out, problem.outputs, problem.rows)
        self.proposals = self._propose()
        self.chosen: _Proposal | None = None

    def _describe(self) -> ctypes.c_void_p:
        problem, description = self.problem, ctypes.c_void_p()
        create = library().cublasLtMatmulDescCreate
        _check(create(ctypes.byref(description), COMPUTE_32F, R_32F), "describe a product")
        epilogue = GELU * problem.gelu | BIAS * problem.bias or DEFAULT
        self._set(description, TRANS_A, ctypes.c_int32(TRANSPOSED))
        self._set(description, EPILOGUE, ctypes.c_uint32(epilogue))
        if problem.dtype == E4M3:
            self._set(description, FAST_ACCUM, ctypes.c_int8(1))
        if problem.bias:
            self._set(description, BIAS_TYPE, ctypes.c_int32(TYPES[problem.wide]))
        return description

    @staticmethod
    def _set(description: ctypes.c_void_p, attribute: int, value: Any) -> None:
        address, size = ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
        status = library().cublasLtMatmulDescSetAttribute(description, attribute, address, size)
        _check(status, f"attribute {attribute}")

    @staticmethod
    def _layout(dtype: torch.dtype, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows))
        status = library().cublasLtMatrixLayoutCreate(ctypes.byref(layout), TYPES[dtype], *sizes)
        _check(status, "describe a matrix")
        return layout

    def _propose(self) -> list[_Proposal]:
        preference = ctypes.c_void_p()
        _check(library().cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "a preference")
        most = ctypes.c_size_t(LARGEST_WORKSPACE)
        size = ctypes.c_size_t(ctypes.sizeof(most))
        set_attribute = library().cublasLtMatmulPreferenceSetAttribute
        _check(set_attribute(preference, WORKSPACE_BYTES, ctypes.byref(most), size), "workspace")
        found, count = (_Proposal * PROPOSALS)(), ctypes.c_int()
        matrices = (self.a, self.b, self.c, self.d)
        status = library().cublasLtMatmulAlgoGetHeuristic(
            _handle(self.problem.device),
            self.description,
            *matrices,
            preference,
            PROPOSALS,
            found,
            ctypes.byref(count),
        )
        library().cublasLtMatmulPreferenceDestroy(preference)
        usable = [found[i] for i in range(count.value) if found[i].state == 0]
        if status or not usable:
            raise NoKernelError(f"cuBLASLt: no kernel for {self.problem}")
        return usable

    def __call__(self, operands: Operands) -> Tensor:
        """Multiply, by the fastest of the proposals, which is found out in the first call."""
        out = operands.out
        if out is None:
            out = self._empty(operands.x)
        with self.lock:  # of the addresses in the description, and of the choice
            if self.chosen is None and _may_time():
                self.chosen = self._fastest(operands)
            self._launch(self.chosen or self.proposals[0], operands, out)
        return out

    def _empty(self, x: Tensor) -> Tensor:
        problem = self.problem
        return torch.empty(problem.rows, problem.outputs, dtype=problem.out, device=x.device)

    def _fastest(self, operands: Operands) -> _Proposal:
        """Time the proposals, on results that nobody reads."""
        scratch = self._empty(operands.x)
        times = []
        for proposal in self.proposals:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._launch(proposal, operands, scratch)
            start.record()
            for _ in range(TIMED_CALLS):
                self._launch(proposal, operands, scratch)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return self.proposals[times.index(min(times))]

    def _launch(self, proposal: _Proposal, operands: Operands, out: Tensor) -> None:
        """Multiply into ``out``."""
        x, weight, alpha, bias, factor, residual, _ = operands
        # PyTorch's allocator knows streams and graphs: one workspace for all would be raced for.
        space = torch.empty(proposal.workspace, dtype=torch.uint8, device=x.device)
        scale, share = ctypes.c_float(alpha), ctypes.c_float(residual is not None)
        for attribute, tensor in ((BIAS_POINTER, bias), (D_SCALE_POINTER, factor)):
            if tensor is not None:
                self._set(self.description, attribute, ctypes.c_void_p(tensor.data_ptr()))
        status = library().cublasLtMatmul(
            _handle(self.problem.device),
            self.description,
            ctypes.addressof(scale),
            weight.data_ptr(),
            self.a,
            x.data_ptr(),
            self.b,
            ctypes.addressof(share),
            None if residual is None else residual.data_ptr(),
            self.c,
            out.data_ptr(),
            self.d,
            ctypes.addressof(proposal.algorithm),
            space.data_ptr(),
            proposal.workspace,
            torch.cuda.current_stream(x.device).cuda_stream,
        )
        _check(status, f"{self.problem}")


def _may_time() -> bool:
    """Tell whether proposals may be timed: a capture allows no waiting, and times differ by run."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return not deterministic and not torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=1024)
def prepare(problem: Problem) -> Product:
    """Prepare a product once."""
    return Product(problem)


@functools.lru_cache(maxsize=1024)
def _number(value: float, device: int) -> Tensor:
    """Keep a number on a GPU, where kernels read it."""
    return torch.tensor([value], dtype=torch.float32, device=f"cuda:{device}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Compute the layer; arguments as :func:`~.op.linear_epilogue`, tensors on the current GPU.

    Raises:
        NoKernelError: cuBLASLt has no kernel for it.
    """
    alpha, gelu, factor, residual, in_place = epilogue
    device = x.device.index
    out = half_of(x.dtype) if factor is None else E4M3
    if residual is not None:
        out = residual.dtype
    kinds = (x.dtype, out, bias is not None, gelu, residual is not None)
    product = prepare(Problem(len(x), len(weight), x.shape[1], *kinds, device))
    number = None if factor is None else _number(factor, device)
    into = residual if in_place else None
    return product(Operands(x, weight, alpha, bias, number, residual, into))
