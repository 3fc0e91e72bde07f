"""Start the GPU in threads, while the program imports what it needs.

Creating a context takes half a second and longer, libraries as long at their first use; both wait
in C most of the time, without Python's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIBRARY = "libcuda.so.1"


def begin_context(device: str) -> threading.Thread | None:
    """Create the context that PyTorch will use, in a thread, before PyTorch is imported.

    Args:
        device: as for :func:`fastadapt.train.devices.parse_device`.

    Returns:
        The thread; ``None`` where PyTorch is imported already, or the device is no GPU.
    """
    if "torch" in sys.modules or not (device == "auto" or device.startswith("cuda")):
        return None
    index = device.partition(":")[2]
    if index and not index.isdecimal():
        return None
    # As PyTorch sets it before it starts CUDA.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = threading.Thread(
        target=_create_context,
        args=(int(index or os.environ.get("LOCAL_RANK", "0")),),
        name="fastadapt context",
        daemon=True,
    )
    thread.start()
    return thread


def _create_context(index: int) -> None:
    """Retain the device's primary context; without a driver or a GPU do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        cuda = ctypes.CDLL(LIBRARY)
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(handle), index) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)


def begin_libraries(device: torch.device) -> threading.Thread | None:
    """Use cuBLAS and cuDNN once, in a thread; ``None`` where the device is no GPU."""
    if device.type != "cuda":
        return None
    thread = threading.Thread(
        target=_use_libraries, args=(device,), name="fastadapt libraries", daemon=True
    )
    thread.start()
    return thread


def _use_libraries(device: torch.device) -> None:
    import torch

    # What fails here fails again, and is told, where it is needed.
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        kind = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        x = torch.ones(2, 8, 8, 8, dtype=kind, device=device)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.ones(8, 8, 3, 3, dtype=kind, device=device, requires_grad=True)
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        (y.flatten(1) @ y.flatten(1).t()).sum().backward()
        torch.cuda.current_stream(device).synchronize()
