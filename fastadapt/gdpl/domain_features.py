"""Read domain features that were computed beforehand, one vector per image file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastadapt.errors import InputError, nearest
from fastadapt.files import check_finite, read_tensors, sha256_tensors


@dataclass(frozen=True)
class FeatureTable:
    """Hold one feature vector per image file.

    Attributes:
        file: that was read.
        tensors: [D_f] each. A key is the end of an image's path, with ``/`` between its parts:
            ``forest/17.png`` is the feature of ``/data/train/forest/17.png``.
    """

    file: Path
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, file: str | Path, width: int | None = None) -> FeatureTable:
        """Read a safetensors file of such vectors.

        Args:
            file: of the vectors.
            width: D_f that is expected; any, if ``None``.

        Raises:
            InputError: the file is missing, damaged or empty; a value is no vector of this width
                (of the others' width) or not finite.
        """
        file = Path(file)
        tensors, _ = read_tensors(file)
        if not tensors:
            raise InputError(f"{file} holds no features; expected one vector per image")
        check_finite(tensors, str(file))
        first, vector = next(iter(tensors.items()))
        who = f"the feature of {first!r} has it" if width is None else "the model takes that"
        width = width or vector.numel()
        for key, vector in tensors.items():
            if vector.shape != (width,):
                raise InputError(
                    f"{file}: {key!r} has shape {tuple(vector.shape)}; expected [{width}], since "
                    f"{who}"
                )
        return cls(file, {key: vector.float() for key, vector in tensors.items()})

    @property
    def width(self) -> int:
        """Return the width D_f of the features."""
        return len(next(iter(self.tensors.values())))

    def fingerprint(self) -> str:
        """Return a hash of all features."""
        return sha256_tensors(self.tensors)

    def of(self, paths: Sequence[Path]) -> Tensor:
        """Look up the features [len(paths), D_f] of images; the longest key that fits counts.

        Raises:
            InputError: an image has none, or two share one.
        """
        owners: dict[str, Path] = {}
        for path in paths:
            key = self._key(path)
            if owners.setdefault(key, path) != path:
                raise InputError(
                    f"{self.file}: {key!r} fits {owners[key]} and {path}: write more of the path "
                    "into the keys"
                )
        return torch.stack([self.tensors[self._key(path)] for path in paths])

    def _key(self, path: Path) -> str:
        parts = path.parts
        names = (Path(*parts[start:]).as_posix() for start in range(len(parts)))
        found = next((name for name in names if name in self.tensors), None)
        if found is None:
            wanted = "/".join(parts[-2:])
            raise InputError(
                f"{self.file} has no feature of {path}: expected the key {wanted!r}, or another "
                f"end of its path. Nearest: {nearest(wanted, self.tensors)}"
            )
        return found
