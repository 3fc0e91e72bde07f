"""Capture training steps and inference in CUDA graphs and replay them.

A replay launches all kernels of a step at once, so that no launch waits for Python.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
Shapes = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]

# Warm-up calls before the capture: libraries load, kernels compile, optimizers create their state.
WARMUP = 3
# The fewest steps that are worth a capture, which costs as much as a few of them.
LEAST_STEPS = 20


class GraphedStep:
    """Run a training step eagerly a few times, then capture it in a CUDA graph and replay that.

    All calls train: the warm-up calls run operator by operator, the capture itself computes
    nothing, and replays read copies of their inputs. Inputs of another size (a smaller last batch)
    are captured, too, at their first call after that. What cannot be captured keeps running
    operator by operator, with the same result: further sizes, CPU tensors, a step that waits for
    the GPU (``.item()``), a graph that does not fit into memory. A replay calls no Python, so the
    step must do the same work every time:

    - it begins with ``optimizer.zero_grad(set_to_none=True)``, and has all of the forward and
      backward pass and the optimizer in it, with ``torch.autocast`` inside, not around it;
    - the optimizer is made with ``capturable=True`` (SGD with ``fused=True``), and the learning
      rate is a tensor on the GPU that is filled between calls: a float would stay as it was
      (PyTorch warns that such an optimizer runs uncaptured, as it does in the first calls);
    - model and optimizer keep their tensors (``load_state_dict`` does), and hold no counters or
      switches in Python (:func:`before_replays` serves what does). Random numbers of PyTorch's
      default generator differ from call to call.

    Args:
        step: a function of tensors without gradients that returns a tensor or a tuple of tensors.
        most: the number of graphs, one for each size; each holds memory of its own.
        say: called once with the reason if the step stays uncaptured on a GPU.
        what: the subject of that line.

    Returns:
        What the step returns, detached; later calls do not overwrite it.

    Source: PyTorch's documentation, CUDA semantics, "Whole-network capture".
    """

    def __init__(
        self,
        step: Callable[..., Outputs],
        *,
        most: int = 2,
        say: Callable[[str], object] | None = None,
        what: str = "training",
    ):
        self._step = step
        self._most = most
        self._say = say
        self._what = what
        self._gpu: GraphCapture | None = None
        self._calls: Counter[Shapes] = Counter()
        self._graphs: dict[Shapes, _Graph] = {}
        self._tried: set[Shapes] = set()

    @property
    def captured(self) -> bool:
        """Whether the step was captured."""
        return bool(self._graphs)

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Run the step, or replay it once it is captured."""
        shapes = _shapes(inputs)
        if shapes in self._graphs:
            return self._graphs[shapes](inputs)
        self._gpu = self._gpu or graph_capture(inputs[0].device)
        if self._gpu is None:
            return map_outputs(self._step(*inputs), Tensor.detach)
        if self._is_due(shapes):
            return self._call_and_capture(self._gpu, shapes, inputs)
        return self._gpu.run(lambda: self._step(*inputs))

    def _is_due(self, shapes: Shapes) -> bool:
        """Count a call; tell whether it is the one to capture."""
        if shapes in self._tried or len(self._graphs) >= self._most:
            return False
        if self._tried and not self._graphs:
            return False  # what cannot be captured once cannot be at another size
        self._calls[shapes] += 1
        # Once one size was captured, libraries and optimizers are ready: this call warms up.
        return bool(self._graphs) or self._calls[shapes] == WARMUP

    def _call_and_capture(
        self, gpu: GraphCapture, shapes: Shapes, inputs: tuple[Tensor, ...]
    ) -> Outputs:
        self._tried.add(shapes)
        outputs, why_not = gpu.watch(lambda: self._step(*inputs))
        if why_not is None:
            # In the inputs' memory format (channels last, say).
            static = tuple(torch.empty_like(x).copy_(x) for x in inputs)
            before: list[Callable[[], object]] = []
            try:
                with collect_before_replays(before):
                    replay = gpu.capture(lambda: self._step(*static))
                self._graphs[shapes] = _Graph(static, before, replay)
            except Exception as error:  # of any kind: the warm-up calls have trained correctly
                why_not = next(iter(str(error).splitlines()), type(error).__name__)
        if why_not is not None and not self._graphs and self._say is not None:
            self._say(f"{self._what} runs operator by operator, without a CUDA graph: {why_not}")
        return outputs


class _Graph(NamedTuple):
    """A captured step.

    Attributes:
        inputs: the memory that the graph reads.
        before: called before every replay.
        replay: returns the memory that the graph writes its outputs to.
    """

    inputs: tuple[Tensor, ...]
    before: list[Callable[[], object]]
    replay: Callable[[], Outputs]

    def __call__(self, inputs: tuple[Tensor, ...]) -> Outputs:
        """Replay on copies of inputs; return copies of the outputs."""
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        for function in self.before:
            function()
        return map_outputs(self.replay(), Tensor.clone)


_collected = threading.local()  # .functions: of the graph that this thread is capturing


def before_replays(function: Callable[[], object]) -> bool:
    """Register a function to be called before every replay of the graph being captured.

    For values that are computed from a model's tensors outside the graph and must follow them. The
    graph keeps the function alive.

    Returns:
        Whether a :class:`GraphedStep` is capturing in this thread; otherwise nothing happens.
    """
    functions = getattr(_collected, "functions", None)
    if functions is None:
        return False
    functions.append(function)
    return True


@contextlib.contextmanager
def collect_before_replays(functions: list[Callable[[], object]]) -> Iterator[None]:
    """Append to a list what :func:`before_replays` registers inside the context."""
    _collected.functions = functions
    try:
        yield
    finally:
        _collected.functions = None


class GraphedCall:
    """Run a function for inference as CUDA graphs, one for each shape of its inputs.

    A new shape is captured at its first call, after warm-up calls on the same inputs. What cannot
    be captured runs operator by operator, with the same result: CPU tensors, a function that waits
    for the GPU, a graph that does not fit into memory, shapes beyond the first ``most``. A replay
    calls no Python, so the function must do the same work every time, with ``torch.autocast``
    inside, not around it. A model must keep its tensors (``load_state_dict`` does): after
    ``model.to`` or :meth:`fastadapt.gdpl.GDPLModel.set_class_names` it needs a new ``GraphedCall``.

    Args:
        function: takes tensors and returns a tensor or a tuple of tensors (a folded model, say).
            It is called without gradients and must not write to its inputs.
        most: the number of graphs; each holds its own memory and a copy of its inputs.
        say: called with the reason, once for each shape that stays uncaptured on a GPU.

    Returns:
        What the function returns; later calls do not overwrite it.

    Source: as :class:`GraphedStep`.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        *,
        most: int = 8,
        say: Callable[[str], object] | None = None,
    ):
        self._function = function
        self._most = most
        self._say = say
        self._graphs: dict[Shapes, GraphedStep] = {}

    @property
    def captured(self) -> int:
        """The number of graphs."""
        return sum(graph.captured for graph in self._graphs.values())

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Run the model, or replay the graph of this batch size."""
        # Not in inference mode: tensors made there could not be filled outside it.
        with torch.inference_mode(False), torch.no_grad():
            shapes = _shapes(inputs)
            if shapes not in self._graphs:
                if len(self._graphs) == self._most or graph_capture(inputs[0].device) is None:
                    return self._function(*inputs)
                graph = GraphedStep(self._function, most=1, say=self._say, what="inference")
                for _ in range(WARMUP):
                    graph(*inputs)
                self._graphs[shapes] = graph
            return self._graphs[shapes](*inputs)


def _shapes(inputs: tuple[Tensor, ...]) -> Shapes:
    return tuple((x.shape, x.dtype, x.device) for x in inputs)


def map_outputs(outputs: Outputs, function: Callable[[Tensor], Tensor]) -> Outputs:
    """Apply a function to a tensor, or to every tensor of a tuple."""
    if isinstance(outputs, Tensor):
        return function(outputs)
    return tuple(function(output) for output in outputs)


def graph_capture(device: torch.device) -> GraphCapture | None:
    """Return the means to capture graphs on a device; ``None`` if it is not a GPU."""
    return GraphCapture(device) if device.type == "cuda" else None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for warm-up and capture, the same one since autograd remembers streams.

    All steps of a device share it: cuBLAS keeps a workspace for every stream that it ever ran on.
    """
    return torch.cuda.Stream(device)


# Graphs whose capture failed. They are kept since PyTorch's allocators may still ask them.
_failed: list[torch.cuda.CUDAGraph] = []


class GraphCapture:
    """Run and capture steps on one CUDA device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = _stream(device)

    def run(self, call: Callable[[], Outputs]) -> Outputs:
        """Call on the capture stream, ordered after and before the work of the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = map_outputs(call(), Tensor.detach)
        current.wait_stream(self._stream)
        return outputs

    def watch(self, call: Callable[[], Outputs]) -> tuple[Outputs, str | None]:
        """Call as :meth:`run`; return the outputs and a reason against a capture, or ``None``."""
        torch.cuda.reset_peak_memory_stats(self._device)  # earlier work may have needed more
        with _record_syncs() as syncs:
            outputs = self.run(call)
        if syncs:
            return outputs, "the step waits for the GPU"
        # A graph keeps its memory, and other batches and evaluation need theirs as well.
        held = torch.cuda.memory_allocated(self._device)
        needed = 2 * (torch.cuda.max_memory_allocated(self._device) - held)
        unused = torch.cuda.memory_reserved(self._device) - held
        free = torch.cuda.mem_get_info(self._device)[0] + unused
        if free < needed:
            return outputs, f"it needs {needed >> 20} MiB of memory, {free >> 20} MiB are free"
        return outputs, None

    def capture(self, step: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Capture a step; return a function that replays it and returns its output tensors.

        Raises:
            Exception: whatever the step or CUDA raises; the state is then as it was before.
        """
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        random = torch.cuda.get_rng_state(self._device)
        try:
            # The outer context restores the stream, which the inner one may not do when it fails.
            # thread_local: other threads may go on using CUDA.
            with (
                _own_workspace(),
                torch.cuda.stream(self._stream),
                torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                outputs = map_outputs(step(), Tensor.detach)
        except Exception:
            self._clean_up(graph, pool, random)
            raise

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    def _clean_up(self, graph: torch.cuda.CUDAGraph, pool: Any, random: Tensor) -> None:
        """Close what PyTorch leaves open after a failed capture: its pool and the generator."""
        _failed.append(graph)
        try:
            graph.pool()
        except RuntimeError:  # the allocator does not know that the capture has ended
            with contextlib.suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, pool)
                torch._C._cuda_releasePool(self._device.index, pool)
        graph.reset()
        try:
            torch.rand(1, device=self._device)
        except RuntimeError:  # "outside graph capture": the generator believes it is still captured
            generator = torch.cuda.default_generators[self._device.index]
            generator.graphsafe_set_state(torch.Generator(self._device))
        torch.cuda.set_rng_state(random, self._device)


@contextlib.contextmanager
def _own_workspace() -> Iterator[None]:
    """Make cuBLAS allocate a new workspace inside the context, from the graph's memory pool.

    The previous workspace is freed whenever torch.compile captures graphs of its own, and a graph
    that captured it would read freed memory.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@contextlib.contextmanager
def _record_syncs() -> Iterator[list[str]]:
    """Collect the calls that wait for the GPU, none of which can be captured.

    PyTorch does not report all of them; the capture fails at the others.
    """
    found: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if "called a synchronizing CUDA operation" in text:
            found.append(text)
        elif "Synchronization debug mode" not in text:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
