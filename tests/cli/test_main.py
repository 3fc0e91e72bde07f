import json
import os
import re
import subprocess
import sys

import pytest

import fastadapt as fa

HEAVY = ("torch", "timm", "torchvision", "numpy", "onnx", "onnxruntime", "matplotlib", "triton")


def fastadapt(*args, **kwargs):
    command = [sys.executable, "-m", "fastadapt", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def heavy_after(code):
    code = f"import sys\n{code}\nprint([m for m in {HEAVY} if m in sys.modules])"
    return subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1]


@pytest.mark.parametrize("args", [("--help",), ("train", "--help"), ("gdpl", "-h"), ("--version",)])
def test_help_imports_nothing_heavy(args):
    code = "\n".join(
        [
            "from fastadapt.__main__ import main",
            f"sys.argv = {['fastadapt', *args]}",
            "try: main()",
            "except SystemExit as end: assert not end.code",
        ]
    )
    assert heavy_after(code) == "[]"


def test_import_brings_nothing_heavy():
    assert heavy_after("import fastadapt") == "[]"
    found = heavy_after("import fastadapt as fa; fa.adapt, fa.kernels.cluster_attention")
    assert "'torch'" in found and "onnx" not in found and "'timm'" not in found


def test_every_public_name_is_there_whatever_was_imported_before():
    code = (
        "import fastadapt.adapted_model, fastadapt.checkpoint, fastadapt.gdpl.train, "
        "fastadapt.export.fold, fastadapt.kernels.cluster_attention.op, fastadapt as fa\n"
        "assert callable(fa.adapt) and callable(fa.fold) and callable(fa.kernels.cluster_attention)"
        "\nassert set(fa.__all__) <= set(dir(fa))\n"
        "[getattr(fa, name) for name in fa.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'adapter'"):
        fa.adapter  # noqa: B018


def test_version():
    done = fastadapt("--version")
    assert done.returncode == 0 and done.stdout == f"fastadapt {fa.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", fa.__version__)


def test_info_names_versions_and_backends():
    done = fastadapt("info")
    assert done.returncode == 0
    for word in ("torch", "backend", "CPUExecutionProvider"):
        assert word in done.stdout
    assert "auto: Triton for CUDA tensors" in " ".join(done.stdout.split())


def test_info_as_json():
    environment = {**os.environ, "FASTADAPT_BACKEND": "tritn"}
    found = json.loads(fastadapt("info", "--json", env=environment).stdout)
    assert found["versions"]["fastadapt"] and found["devices"][0].startswith("cpu")
    assert found["backend"] == "FASTADAPT_BACKEND is 'tritn'; expected auto, triton or reference"


@pytest.mark.parametrize(
    "args", [("trane",), ("train",), ("export", "--onyx"), ("export", "--no-json")]
)
def test_wrong_usage_is_exit_code_two(args):
    assert fastadapt(*args).returncode == 2


def test_output_that_cannot_be_shown_stops_nothing(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
    for args in (("--help",), ("train", "--help"), ("info",)):
        done = fastadapt(*args, env=environment)
        assert done.returncode == 0 and done.stdout, done.stderr
    done = fastadapt("verify", str(tmp_path / "größe"), env=environment)
    assert done.returncode == 1 and done.stderr.startswith("fastadapt: ")
    assert done.stderr.count("\n") == 1 and "internal" not in done.stderr


def test_bench_names_what_there_is_and_what_was_left_out():
    done = fastadapt("bench", "warp_drive")
    assert done.returncode == 1
    assert "'warp_drive'; there are cluster_attention, cladapter" in done.stderr


def test_bench_writes_its_results(tmp_path):
    done = fastadapt("bench", "prompt_learner", "--quick", "--json", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*/results.json")
    result = json.loads(file.read_text())["benchmarks"]["prompt_learner"]
    command = result["environment"]["command"]
    assert command == f"fastadapt bench prompt_learner --quick --json {tmp_path}"
