"""The file of cached features: a ``.npy`` file with the SHA-256 of its content after it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastadapt.files import atomic_path

CACHE_NAME = re.compile(r"[0-9a-f]{24}\.npy")
_DIGEST = 32  # bytes after the array


def open_cache(
    path: Path, shape: tuple[int, ...], dtypes: Container[str] = ("float16", "float32")
) -> np.ndarray | None:
    """Map a cache; return ``None``, and remove it, if it is not what was written, or another's.

    Args:
        path: of the file.
        shape: that it must have: [views, samples, tokens, channels].
        dtypes: that it may have.
    """
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(-_DIGEST, 2)
            said = file.read()
        end = features.offset + features.nbytes
        fits = features.shape == shape and features.dtype.name in dtypes
        whole = path.stat().st_size == end + _DIGEST
        if fits and whole and _digest(features).digest() == said:
            return features
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        pass
    path.unlink(missing_ok=True)
    return None


def is_cache(path: Path) -> bool:
    """Say whether a file is a cache, by its name and its size; others' arrays end earlier."""
    if not CACHE_NAME.fullmatch(path.name) or path.is_symlink():
        return False
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        return path.stat().st_size == features.offset + features.nbytes + _DIGEST
    except (OSError, ValueError, EOFError, AttributeError):
        return False


class writing(AbstractContextManager):
    """Write a cache under a temporary name; it gets its own once it is whole."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype):
        self._context = atomic_path(path)
        self._shape, self._dtype = tuple(shape), np.dtype("f2" if dtype.itemsize == 2 else "f4")
        self._hash = hashlib.sha256()
        self._file: BinaryIO

    def __enter__(self) -> writing:
        self._file = self._context.__enter__().open("wb")
        header = {"shape": self._shape, "fortran_order": False}
        header["descr"] = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(self._file, header)
        return self

    def write(self, values: Tensor) -> None:
        """Append values on the CPU."""
        data = values.contiguous().numpy().data
        self._hash.update(data)
        self._file.write(data)

    def __exit__(self, kind, error, traceback) -> bool | None:
        try:
            if kind is None:
                self._file.write(self._hash.digest())
            self._file.close()
        except OSError as failure:
            self._context.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return self._context.__exit__(kind, error, traceback)


def _digest(features: np.ndarray):
    digest = hashlib.sha256()
    for view in features:
        for start in range(0, len(view), 256):
            digest.update(np.ascontiguousarray(view[start : start + 256]).data)
    return digest
