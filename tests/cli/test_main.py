import json
import resource
import subprocess
import sys

import pytest


def fastadapt(*args, **kwargs):
    command = [sys.executable, "-m", "fastadapt", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def seconds(*command):
    """Processor time, which other programs on the machine do not change much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick():
    torch = min(seconds(sys.executable, "-c", "import torch") for _ in range(2))
    ours = min(seconds(sys.executable, "-m", "fastadapt", "--help") for _ in range(2))
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


def test_bench_names_what_there_is_and_what_was_left_out():
    done = fastadapt("bench", "warp_drive")
    assert done.returncode == 1
    assert "'warp_drive'; there are cluster_attention, cladapter" in done.stderr


def test_bench_writes_its_results(tmp_path):
    done = fastadapt("bench", "prompt_learner", "--quick", "--json", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    command = json.loads(file.read_text())["environment"]["command"]
    assert command == f"fastadapt bench prompt_learner --quick --json {tmp_path}"
