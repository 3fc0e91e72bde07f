"""What is here: versions, devices, backends, runtimes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch
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
    "tensorrt",
    "tensorrt-rtx-cu13",
    "safetensors",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Installed packages that matter here, by name."""
    found = {"python": platform.python_version()}
    for name in ("fastadapt", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices() -> list[str]:
    """The CPU and every GPU, in words."""
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def gpus() -> list[dict[str, str]]:
    """Name, driver version and compute capability of every NVIDIA GPU, as nvidia-smi says."""
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
    """ONNX Runtime's execution providers that this installation was built with."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return onnxruntime.get_available_providers()


def environment_table() -> Table:
    """All of it, for the terminal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("", "")
    for line in devices():
        table.add_row("device", line)
    backend = os.environ.get("FASTADAPT_BACKEND", "auto")
    meaning = "the reference" if backend == "auto" else "as FASTADAPT_BACKEND says"
    table.add_row("backend", f"{backend}: {meaning}")
    table.add_row("ONNX Runtime", ", ".join(providers()) or "not installed")
    return table
