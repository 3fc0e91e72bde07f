import subprocess
import sys
import time

import pytest


def fastadapt(*args, **kwargs):
    command = [sys.executable, "-m", "fastadapt.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def seconds(*command):
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def test_help_is_quick():
    torch = min(seconds(sys.executable, "-c", "import torch") for _ in range(2))
    ours = min(seconds(sys.executable, "-m", "fastadapt.cli", "--help") for _ in range(2))
    assert ours - torch < 2


def test_import_brings_no_heavy_package():
    code = (
        "import sys, fastadapt; "
        "print([m for m in ('timm', 'torchvision', 'onnx', 'onnxruntime', 'matplotlib') "
        "if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_info_names_versions_and_backends():
    done = fastadapt("info")
    assert done.returncode == 0
    for word in ("torch", "backend", "CPUExecutionProvider"):
        assert word in done.stdout


@pytest.mark.parametrize("args", [("trane",), ("train",), ("export", "--onyx")])
def test_wrong_usage_is_exit_code_two(args):
    assert fastadapt(*args).returncode == 2
