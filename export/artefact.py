"""The files of a bundle that run: one :class:`Artefact` each, with its status and its parity."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .parity import Parity

NATIVE = ("aotinductor", "tensorrt", "tensorrt_rtx")  # hold machine code; a .json lies beside
PROGRAMS = ("executorch", "litert", "coreml")  # hold instructions of a runtime
FOLDERS = ("coreml",)  # whose path is a folder: Core ML's packages
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
VERIFIED, UNVERIFIED, REFUSED, FAILED = "verified", "unverified", "refused", "failed"


@dataclass(frozen=True)
class Artefact:
    """A file of a bundle that runs, as the manifest lists it.

    Attributes:
        kind: ``"onnx"`` (for ONNX Runtime), ``"openvino"``, ``"fastadapt"``, one of ``NATIVE`` or
            of ``PROGRAMS``.
        path: name of the file, or of one of ``FOLDERS``, in the bundle; ``None`` if it was
            refused.
        precision: one of ``PRECISIONS``, as the file was built.
        status: ``"verified"`` (it ran here and agreed), ``"unverified"`` (it cannot run here;
            ``verify`` on the target machine settles it), ``"refused"`` (not worth shipping, with
            the numbers; the bundle is good without it) or ``"failed"`` (it ran and disagreed: the
            bundle is rejected).
        reason: why it is not verified.
        parity: every comparison with the trained model; recorded for refused files, too.
        speed: images per second where it ran, by runtime and batch size.
        files: names of every file that belongs to it, the metadata beside it included; of a
            folder ``NAME/FILE`` for each in it.
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
