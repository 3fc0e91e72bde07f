"""Training steps and inference as CUDA graphs: no launch of their operators waits for the host."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]

WARMUP = 3  # calls before the capture: libraries load, kernels compile, optimizers make their state
LEAST_STEPS = 20  # steps that make up for a capture, which costs about as much as a few of them


class GraphedStep:
    """Calls a training step a few times, then captures it in a CUDA graph, and replays that.

    All calls train: those before the capture run operator by operator, the capture itself computes
    nothing, and replays read what is passed to them from a copy. Whatever cannot be captured keeps
    running operator by operator, with the same result: inputs of other shapes (a last batch that
    is smaller), CPU tensors, a step that waits for the GPU (``.item()``), one whose graph does not
    fit into the memory. A replay calls no Python, so the step must do the same work every time:

    - it begins with ``optimizer.zero_grad(set_to_none=True)``, and has all of the forward and
      backward pass and the optimizer in it, with ``torch.autocast`` inside, not around it;
    - the optimizer is made with ``capturable=True`` (SGD with ``fused=True``), and the learning
      rate is a tensor on the GPU that is filled between calls: a float would stay as it was
      (PyTorch warns that such an optimizer runs uncaptured, as it does in the first calls);
    - model and optimizer keep their tensors (``load_state_dict`` does), and hold no counters or
      switches in Python (:func:`before_replays` is for what does). Random numbers of PyTorch's
      default generator differ from call to call.

    Args:
        step: a function of tensors without gradients, which gives a tensor or a tuple of them.
        say: called with the reason, once, if the step stays uncaptured on a GPU.
        what: the subject of that line.

    Returns:
        What the step returns, detached; later calls leave it as it is.

    Source: PyTorch's documentation, CUDA semantics, "Whole-network capture".
    """

    def __init__(
        self,
        step: Callable[..., Outputs],
        *,
        say: Callable[[str], object] | None = None,
        what: str = "training",
    ):
        self._step = step
        self._say = say
        self._what = what
        self._gpu: _Gpu | None = None
        self._calls: Counter[tuple] = Counter()  # by the inputs' shapes
        self._decided = False  # whether there is a graph, or will be none
        self._replay: Callable[[], Outputs] | None = None
        self._shapes: tuple | None = None  # of the graph
        self._inputs: tuple[Tensor, ...] = ()  # what the graph reads
        self._before: list[Callable[[], object]] = []  # replays

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self._replay is not None

    def __call__(self, *inputs: Tensor) -> Outputs:
        shapes = _shapes(inputs)
        if shapes == self._shapes:
            for static, x in zip(self._inputs, inputs, strict=True):
                static.copy_(x)
            for function in self._before:
                function()
            return _each(self._replay(), Tensor.clone)
        self._gpu = self._gpu or _gpu(inputs[0].device)
        if self._gpu is None:
            return _each(self._step(*inputs), Tensor.detach)
        if not self._decided:
            self._calls[shapes] += 1
            if self._calls[shapes] == WARMUP:
                self._decided = True
                return self._call_and_capture(shapes, inputs)
        return self._gpu.run(lambda: self._step(*inputs))

    def _call_and_capture(self, shapes: tuple, inputs: tuple[Tensor, ...]) -> Outputs:
        outputs, why_not = self._gpu.watch(lambda: self._step(*inputs))
        if why_not is None:
            # Of the inputs' layout, channels last for one.
            static = tuple(torch.empty_like(x).copy_(x) for x in inputs)
            try:
                with _collecting(self._before):
                    self._replay = self._gpu.capture(lambda: self._step(*static))
                self._shapes, self._inputs = shapes, static
            except Exception as error:  # whatever it is, the calls before this one went well
                why_not = next(iter(str(error).splitlines()), type(error).__name__)
        if why_not is not None and self._say is not None:
            self._say(f"{self._what} runs operator by operator, without a CUDA graph: {why_not}")
        return outputs


_collected = threading.local()  # .functions: of the graph that this thread captures


def before_replays(function: Callable[[], object]) -> bool:
    """Has a function called before every replay of the graph that is being captured.

    For what is made of a model's tensors outside the graph, and must follow them. It lives as long
    as the graph.

    Returns:
        Whether a :class:`GraphedStep` captures in this thread; else nothing happens.
    """
    functions = getattr(_collected, "functions", None)
    if functions is None:
        return False
    functions.append(function)
    return True


@contextlib.contextmanager
def _collecting(functions: list[Callable[[], object]]) -> Iterator[None]:
    _collected.functions = functions
    try:
        yield
    finally:
        _collected.functions = None


class GraphedCall:
    """A function for inference, replayed as CUDA graphs: one for each shape of its inputs.

    A new shape is captured when it first comes, after a few calls on the same inputs. Whatever
    cannot be captured runs operator by operator, with the same result: CPU tensors, what waits for
    the GPU, a graph that does not fit into the memory, shapes beyond the first ``most``. A replay
    calls no Python, so the function must do the same work every time, ``torch.autocast`` inside,
    not around it. A model keeps its tensors (``load_state_dict`` does): after ``model.to`` or
    :meth:`fastadapt.gdpl.GDPLModel.set_class_names` it needs another ``GraphedCall``.

    Args:
        function: of tensors, gives a tensor or a tuple of them; a folded model, for one. Called
            without gradients. It must not write to its inputs.
        most: graphs; each keeps memory of its own, and a copy of its inputs.
        say: called with the reason, once for each shape that stays uncaptured on a GPU.

    Returns:
        What the function returns; later calls leave it as it is.

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
        self._graphs: dict[tuple, GraphedStep] = {}

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return sum(graph.captured for graph in self._graphs.values())

    def __call__(self, *inputs: Tensor) -> Outputs:
        # Not in inference mode: a graph's inputs would be tensors that nothing outside may fill.
        with torch.inference_mode(False), torch.no_grad():
            shapes = _shapes(inputs)
            if shapes not in self._graphs:
                if len(self._graphs) == self._most or _gpu(inputs[0].device) is None:
                    return self._function(*inputs)
                graph = GraphedStep(self._function, say=self._say, what="inference")
                for _ in range(WARMUP):
                    graph(*inputs)
                self._graphs[shapes] = graph
            return self._graphs[shapes](*inputs)


def _shapes(inputs: tuple[Tensor, ...]) -> tuple:
    return tuple((x.shape, x.dtype, x.device) for x in inputs)


def _each(outputs: Outputs, function: Callable[[Tensor], Tensor]) -> Outputs:
    if isinstance(outputs, Tensor):
        return function(outputs)
    return tuple(function(output) for output in outputs)


def _gpu(device: torch.device) -> _Gpu | None:
    return _Gpu(device) if device.type == "cuda" else None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps run before they are captured, and are captured: autograd remembers streams.

    One for all, since cuBLAS keeps a workspace for every stream that it ever ran on.
    """
    return torch.cuda.Stream(device)


_failed: list[torch.cuda.CUDAGraph] = []  # kept: PyTorch's allocators may ask them later


class _Gpu:
    """What graphs need of CUDA."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = _stream(device)

    def run(self, call: Callable[[], Outputs]) -> Outputs:
        """Calls, after what the current stream has to do, and before what it gets to do next."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = _each(call(), Tensor.detach)
        current.wait_stream(self._stream)
        return outputs

    def watch(self, call: Callable[[], Outputs]) -> tuple[Outputs, str | None]:
        """The same; and a reason against a capture, if there is one."""
        torch.cuda.reset_peak_memory_stats(self._device)  # other work before may have needed more
        with _waits() as waits:
            outputs = self.run(call)
        if waits:
            return outputs, "the step waits for the GPU"
        # A graph keeps its memory, beside which other batches and evaluation need theirs.
        held = torch.cuda.memory_allocated(self._device)
        needed = 2 * (torch.cuda.max_memory_allocated(self._device) - held)
        unused = torch.cuda.memory_reserved(self._device) - held
        free = torch.cuda.mem_get_info(self._device)[0] + unused
        if free < needed:
            return outputs, f"it needs {needed >> 20} MiB of memory, {free >> 20} MiB are free"
        return outputs, None

    def capture(self, step: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """A function that runs the step as a graph, and gives its outputs' memory.

        Raises:
            Exception: whatever the step, or CUDA, has against it. Then all is as it was before.
        """
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        random = torch.cuda.get_rng_state(self._device)
        try:
            # The outer context restores the stream, which the inner one may not when it fails.
            # Other threads may go on using CUDA.
            with (
                _own_workspace(),
                torch.cuda.stream(self._stream),
                torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                outputs = _each(step(), Tensor.detach)
        except Exception:
            self._clean_up(graph, pool, random)
            raise

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    def _clean_up(self, graph: torch.cuda.CUDAGraph, pool: tuple, random: Tensor) -> None:
        """What PyTorch leaves open when CUDA ends a capture: its pool and the generator."""
        _failed.append(graph)
        try:
            graph.pool()
        except RuntimeError:  # it was not told that the capture is over
            with contextlib.suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, pool)
                torch._C._cuda_releasePool(self._device.index, pool)
        graph.reset()
        try:
            torch.rand(1, device=self._device)
        except RuntimeError:  # "outside graph capture": it takes itself to be captured still
            generator = torch.cuda.default_generators[self._device.index]
            generator.graphsafe_set_state(torch.Generator(self._device))
        torch.cuda.set_rng_state(random, self._device)


@contextlib.contextmanager
def _own_workspace() -> Iterator[None]:
    """Has cuBLAS get a new workspace within, from the memory of the graph that is captured.

    The old one is freed whenever torch.compile captures graphs of its own, and a graph would go on
    using it.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@contextlib.contextmanager
def _waits() -> Iterator[list[str]]:
    """Collects what waits for the GPU; a capture that meets such a call could not go on.

    PyTorch does not know of all; the capture fails at the others.
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
