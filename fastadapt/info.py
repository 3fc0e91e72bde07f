"""Say what is here: versions, devices, backends, runtimes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = (
    "torch",
    "triton",
    "timm",
    "open_clip_torch",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "nncf",
    "executorch",
    "litert-torch",
    "ai-edge-litert",
    "coremltools",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "safetensors",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that matter here, by name."""
    found = {"python": platform.python_version()}
    for name in ("fastadapt", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices() -> list[str]:
    """Describe the CPU and every GPU."""
    import torch

    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def processor() -> str:
    """Name the processor, with the numbers of its kind where its name says little."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            return done.stdout.strip()
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n"):
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    # Of x86 and of ARM.
    keys = ("cpu family", "model") if "cpu family" in found else ("CPU implementer", "CPU part")
    kind = [found[key] for key in keys if key in found]
    return f"{name} ({'-'.join(kind)})" if kind else name


def gpus() -> list[dict[str, str]]:
    """Return name, driver version and compute capability of every NVIDIA GPU, by nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    keys = {"name": "name", "driver": "driver_version", "compute_capability": "compute_cap"}
    query = f"--query-gpu={','.join(keys.values())}"
    try:
        done = subprocess.run(
            [command, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


def providers() -> list[str]:
    """Return the execution providers that the installed ONNX Runtime was built with."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return onnxruntime.get_available_providers()


def backend() -> str:
    """Say which backend the operations take: FASTADAPT_BACKEND's, or automatically."""
    chosen = os.environ.get("FASTADAPT_BACKEND", "auto")
    if chosen == "auto":
        return "auto: Triton for CUDA tensors that it supports, the reference for all others"
    if chosen in ("triton", "reference"):
        return f"{chosen}: as FASTADAPT_BACKEND says"
    return f"FASTADAPT_BACKEND is {chosen!r}; expected auto, triton or reference"


def environment() -> dict[str, Any]:
    """Return all of it."""
    return {
        "versions": versions(),
        "devices": devices(),
        "backend": backend(),
        "onnxruntime_providers": providers(),
    }


def environment_table(found: dict[str, Any]) -> Table:
    """Lay out what :func:`environment` found, for the terminal."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, version in found["versions"].items():
        table.add_row(name, version)
    table.add_row("", "")
    for line in found["devices"]:
        table.add_row("device", line)
    table.add_row("backend", found["backend"])
    table.add_row("ONNX Runtime", ", ".join(found["onnxruntime_providers"]) or "not installed")
    return table
