"""What a bundle holds to run: one :class:`Artefact` per file, and how well it must agree."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastadapt.errors import InputError

from .parity import Parity, Thresholds

KINDS = ("onnx", "tensorrt", "tensorrt_rtx", "aotinductor")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
VERIFIED, UNVERIFIED, REFUSED, FAILED = "verified", "unverified", "refused", "failed"


def rate(per_second: float) -> str:
    """In words, to three digits: ``0.52``, ``20.5``, ``991``, ``14,700``."""
    return f"{float(f'{per_second:.3g}'):,g}"


@dataclass(frozen=True)
class Batches:
    """The batch sizes that an engine is built for, and tuned for: ``MIN:OPT:MAX``."""

    min: int = 1
    opt: int = 8
    max: int = 32

    @classmethod
    def parse(cls, text: str) -> Batches:
        """``"1:8:32"``, or ``"8"`` for a fixed batch. Raises InputError."""
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
        """MIN, OPT, MAX and an odd batch between them: what the gate compares at."""
        odd = next((n for n in (5, 3, *range(self.max, self.min, -1)) if self._is_new(n)), None)
        sizes = {self.min, self.opt, self.max} | ({odd} if odd else set())
        return tuple(sorted(sizes))

    def _is_new(self, n: int) -> bool:
        return n % 2 == 1 and self.min < n < self.max and n != self.opt

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


DEFAULT_BATCHES = Batches()


@dataclass(frozen=True)
class Artefact:
    """One file of a bundle that runs, as its manifest lists it.

    Attributes:
        kind: ``"onnx"`` (for ONNX Runtime), ``"tensorrt"``, ``"tensorrt_rtx"`` or
            ``"aotinductor"``.
        path: of the file in the bundle; ``None`` if it was refused.
        precision: one of ``PRECISIONS``, as it was built.
        status: ``"verified"`` (ran here and agreed), ``"unverified"`` (cannot run here; ``verify``
            on the target machine settles it), ``"refused"`` (not worth shipping, with the numbers;
            the bundle is good without it) or ``"failed"`` (ran and disagreed: the bundle is
            rejected).
        reason: why it is not verified.
        parity: what the gate compared, reference and end to end; also for the refused.
        speed: images per second, by provider and batch size, where it ran.
        files: every file that belongs to it, the metadata beside it included.
        details: of the kind: batch sizes, targets, versions, layers, what was kept in fp32.
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
        return self.path is not None and self.status in (VERIFIED, UNVERIFIED)

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(replace(self, parity=())),
            "parity": [parity.to_dict() for parity in self.parity],
            "files": list(self.files),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Artefact:
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        parity = []
        for row in values.get("parity", ()):
            row = {key: row[key] for key in Parity.__dataclass_fields__ if key in row}
            parity.append(Parity(**{**row, "problems": tuple(row.get("problems", ()))}))
        return cls(**{**known, "parity": tuple(parity), "files": tuple(values.get("files", ()))})


# Half precision rounds at every layer: the worst output of what is right is off by 0.5 to 2 % of
# the spread in fp16 on the backbones that are tested, eight times that in bf16, where some need
# fp32 layers. 8 bit is judged by its accuracy on the validation split (quantize.py); its bounds
# only tell an engine that works from one that does not.
THRESHOLDS = {
    "fp32": Thresholds(),
    "fp16": Thresholds(error=0.05, cosine=0.999, origin=0.7),
    "bf16": Thresholds(error=0.1, cosine=0.99, origin=0.7),
    "int8": Thresholds(error=1.0, cosine=0.5, origin=0.7),
    "fp8": Thresholds(error=1.0, cosine=0.5, origin=0.7),
}
