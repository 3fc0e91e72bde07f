"""Run a backbone once, for its shapes or its graph, without cuDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def unplanned(run: Callable[[], Result]) -> Result:
    """Call a function without cuDNN, or with it where something needs it.

    cuDNN plans each convolution anew for each shape, which takes two seconds for a small network:
    too much for one image whose numbers nobody looks at.
    """
    try:
        with torch.backends.cudnn.flags(enabled=False):
            return run()
    except RuntimeError:  # PyTorch has no other convolution of volumes, say
        return run()
