"""Keep memory of the CPU that a training step frees, so that the next one finds it.

The C library returns large blocks to the system as soon as they are freed. Each step asks for the
same ones again, and the system fills them with zeros, page by page: a seventh of the time of an
epoch on a CPU (docs/performance-notes.md).
"""

from __future__ import annotations

import ctypes

# <malloc.h> of the GNU C library.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1
# The second is the largest that older versions take.
_BLOCK_BYTES = (2**30, 2**25)


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees, from now on.

    Returns:
        Whether it does: another C library than GNU's is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = any(mallopt(_MMAP_THRESHOLD, size) for size in _BLOCK_BYTES)
    return bool(kept and mallopt(_TRIM_THRESHOLD, _LARGEST_INT))
