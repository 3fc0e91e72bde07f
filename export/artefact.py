"""The files of a bundle that run: one :class:`Artefact` each, with its status and its parity."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastadapt.errors import InputError

from .parity import Parity

KINDS = ("onnx", "tensorrt", "tensorrt_rtx", "aotinductor")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
VERIFIED, UNVERIFIED, REFUSED, FAILED = "verified", "unverified", "refused", "failed"


@dataclass(frozen=True)
class Batches:
    """The batch sizes that an engine is built and tuned for: ``MIN:OPT:MAX``.

    Attributes:
        min: smallest batch that the engine takes.
        opt: batch that it is tuned for.
        max: largest batch that it takes.
    """

    min: int = 1
    opt: int = 8
    max: int = 32

    @classmethod
    def parse(cls, text: str) -> Batches:
        """Parse ``"1:8:32"``, or ``"8"`` for a fixed batch.

        Raises:
            InputError: the text is neither, or the sizes are not 1 ≤ MIN ≤ OPT ≤ MAX.
        """
        parts = text.split(":")
        if len(parts) == 1:
            parts *= 3
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise InputError(f"--batch is {text!r}; expected MIN:OPT:MAX, 1:8:32 for one")
        low, opt, high = map(int, parts)
        if not 1 <= low <= opt <= high:
            raise InputError(f"--batch is {text!r}; expected 1 ≤ MIN ≤ OPT ≤ MAX")
        return cls(low, opt, high)

    @property
    def checked(self) -> tuple[int, ...]:
        """Return the sizes that parity is checked at: MIN, OPT, MAX and an odd one between."""
        odd = next((n for n in (5, 3, *range(self.max, self.min, -1)) if self._is_new(n)), None)
        sizes = {self.min, self.opt, self.max} | ({odd} if odd else set())
        return tuple(sorted(sizes))

    def _is_new(self, n: int) -> bool:
        return n % 2 == 1 and self.min < n < self.max and n != self.opt

    def to_dict(self) -> dict[str, int]:
        """Return the sizes by name, as a manifest records them."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


DEFAULT_BATCHES = Batches()


@dataclass(frozen=True)
class Artefact:
    """A file of a bundle that runs, as the manifest lists it.

    Attributes:
        kind: ``"onnx"`` (for ONNX Runtime), ``"tensorrt"``, ``"tensorrt_rtx"`` or
            ``"aotinductor"``.
        path: name of the file in the bundle; ``None`` if it was refused.
        precision: one of ``PRECISIONS``, as the file was built.
        status: ``"verified"`` (it ran here and agreed), ``"unverified"`` (it cannot run here;
            ``verify`` on the target machine settles it), ``"refused"`` (not worth shipping, with
            the numbers; the bundle is good without it) or ``"failed"`` (it ran and disagreed: the
            bundle is rejected).
        reason: why it is not verified.
        parity: every comparison with the trained model; recorded for refused files, too.
        speed: images per second where it ran, by runtime and batch size.
        files: names of every file that belongs to it, the metadata beside it included.
        details: what depends on the kind: batch sizes, targets, versions, layers kept in fp32.
    """

    kind: str
    path: str | None
    precision: str
    status: str
    reason: str = ""
    parity: tuple[Parity, ...] = ()
    speed: dict[str, dict[str, float]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def runnable(self) -> bool:
        """Whether the bundle holds the file, and it has not failed."""
        return self.path is not None and self.status in (VERIFIED, UNVERIFIED)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry that a manifest holds."""
        return {
            **asdict(replace(self, parity=())),
            "parity": [parity.to_dict() for parity in self.parity],
            "files": list(self.files),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Artefact:
        """Make an artefact from a manifest's entry; keys that it does not know are left out."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        parity = []
        for row in values.get("parity", ()):
            row = {key: row[key] for key in Parity.__dataclass_fields__ if key in row}
            parity.append(Parity(**{**row, "problems": tuple(row.get("problems", ()))}))
        return cls(**{**known, "parity": tuple(parity), "files": tuple(values.get("files", ()))})
