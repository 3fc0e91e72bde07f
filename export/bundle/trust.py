"""Which bundles may run native code here: those that were made on this machine.

A ``.pt2`` of AOTInductor and a TensorRT engine are programs. A bundle's hashes show that its files
belong together, not who made them: integrity, not authenticity. So native code of a bundle runs
only if the hash of its manifest was recorded here when it was made, or if the user says that its
maker is trusted.

A ``.pte`` of ExecuTorch and a ``.tflite`` of LiteRT hold no machine code, but their runtimes are
no fence: LiteRT's makers call running a foreign model the same as running foreign code, and
ExecuTorch's loader has had overflows. Nor does Apple promise what a foreign ``.mlpackage`` of Core
ML cannot do. They are treated as native code is. ONNX files hold no code.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from fastadapt.files import content_sha256

from ..artefact import NATIVE, PROGRAMS, Artefact

GUARDED = (*NATIVE, *PROGRAMS)


def remember_bundle(manifest: dict[str, Any]) -> None:
    """Record that a bundle was made here; without a folder to write to, it counts as foreign."""
    with contextlib.suppress(OSError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / content_sha256(manifest)).touch()


def made_here(manifest: dict[str, Any]) -> bool:
    """Tell whether :func:`remember_bundle` was called for this manifest on this machine."""
    try:
        return (_folder() / content_sha256(manifest)).is_file()
    except OSError:
        return False


def why_not_run(artefact: Artefact, manifest: dict[str, Any], trust: bool) -> str | None:
    """Say why a file must not run; ``None`` if it may."""
    if artefact.kind not in GUARDED or trust or made_here(manifest):
        return None
    what = "holds native code" if artefact.kind in NATIVE else "is a program of its runtime"
    return (
        f"{artefact.path} {what} and the bundle was not made on this machine: run it "
        "with `trust=True` if you trust its maker"
    )


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "fastadapt" / "bundles"
