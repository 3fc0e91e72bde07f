import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

import fastadapt as fa
from fastadapt import cli
from fastadapt.bench.protocol import Tables
from fastadapt.bench.suites import prompt_learner

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


def test_info_names_versions_and_backends(command):
    code, out, _ = command("info")
    assert code == 0
    for word in ("torch", "backend", "CPUExecutionProvider"):
        assert word in out
    assert "auto: Triton for CUDA tensors" in " ".join(out.split())


def test_info_as_json(command, monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "tritn")
    found = json.loads(command("info", "--json")[1])
    assert found["versions"]["fastadapt"] and found["devices"][0].startswith("cpu")
    assert found["backend"] == "FASTADAPT_BACKEND is 'tritn'; expected auto, triton or reference"


@pytest.mark.parametrize(
    "args", [("trane",), ("train",), ("export", "--onyx"), ("export", "--no-json")]
)
def test_wrong_usage_is_exit_code_two_and_one_line(command, args):
    code, out, err = command(*args)
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("fastadapt: ") and err.rstrip().endswith("--help has all options")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("predict", "bundle", "", "--out", "o.csv"), "the argument after 'bundle' is empty"),
        (("train", "data", "--seeds", "", "--out", "o"), "the argument after '--seeds' is empty"),
        (("export", "run", "--out="), "the argument '--out=' is empty"),
        (("",), "the argument '' is empty"),
    ],
)
def test_an_empty_argument_is_not_the_working_folder(command, args, says):
    code, out, err = command(*args)
    assert code == 2 and not out and err.count("\n") == 1 and says in err


def test_a_value_that_is_no_choice_is_one_line(command):
    code, _, err = command("train", "data", "--select", "r2", "--out", "out")
    assert (code, err.count("\n")) == (2, 1) and "Value error" not in err
    assert "'--select': 'r2' is not one of 'macro_f1', 'accuracy', 'loss'" in err


def test_output_that_cannot_be_shown_stops_nothing(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
    calls = [["--help"], ["train", "--help"], ["info"], ["verify", str(tmp_path / "größe")]]
    code = (
        "import sys\nfrom fastadapt.__main__ import main\n"
        f"for args in {calls}:\n"
        "    sys.argv[1:] = args\n"
        "    print('called', args[0])\n"
        "    try: main()\n"
        "    except SystemExit as end: print('ended', end.code or 0, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.split("called ")[1:]
    for out in shown:
        assert out.endswith("ended 0\n") and out.count("\n") > 5, out
    assert last == "verify\nended 1\n"
    assert done.stderr.startswith("fastadapt: ") and "internal" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["", "tritn"])
def test_a_wrong_backend_is_named_before_any_work(command, monkeypatch, tmp_path, value):
    monkeypatch.setenv("FASTADAPT_BACKEND", value)
    for args in (("train", tmp_path, "--backbone", "x"), ("predict", "x", tmp_path)):
        code, _, error = command(*args, "--out", tmp_path / "o.csv")
        assert code == 1 and error.count("\n") == 1
        assert f"FASTADAPT_BACKEND is {value!r}; expected one of auto, triton" in error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(36, "File name too long", "x" * 5000), "x…: File name too long"),
        (PermissionError(13, "Permission denied", "a", None, "b"), "a and b: Permission denied"),
        (OSError("no number"), "fastadapt: no number"),
        (MemoryError(), "the machine's memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 B"), "the machine's memory"),
    ],
)
def test_errors_of_the_system_are_no_internal_ones(command, monkeypatch, error, says):
    def fail(**_):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    code, _, said = command("info")
    assert code == 1 and says in said and said.count("\n") == 1 and len(said) < 300
    assert "internal" not in said and "Errno" not in said


@pytest.mark.parametrize("where", ["lost/x", "file/x", "/proc/x"])
def test_where_results_go_is_decided_before_any_work(command, tmp_path, where):
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / where
    for args in (
        ("train", tmp_path / "none", "--backbone", "x", "--out", out),
        ("predict", "none", "none", "--out", f"{out}.csv"),
        ("embed", "none", "none", "--out", f"{out}.csv"),
        ("export", "none", "--out", out),
        ("bench", "prompt_learner", "--json", out),
    ):
        code, _, error = command(*args)
        assert code == 1 and error.count("\n") == 1, error
        assert "cannot be written" in error or "a file, so that" in error or "nowhere" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_bench_names_what_there_is_and_what_was_left_out(command):
    code, _, error = command("bench", "warp_drive")
    assert code == 1
    assert "'warp_drive'; there are cluster_attention, cladapter" in error


def test_bench_writes_its_results(command, monkeypatch, tmp_path):
    benchmark = dataclasses.replace(prompt_learner.BENCHMARK, run=lambda quick: iter([Tables({})]))
    monkeypatch.setattr(prompt_learner, "BENCHMARK", benchmark)
    code, _, error = command("bench", "prompt_learner", "--quick", "--json", tmp_path)
    assert code == 0, error
    (file,) = tmp_path.glob("*/results.json")
    result = json.loads(file.read_text())["benchmarks"]["prompt_learner"]
    said = result["environment"]["command"]
    assert said == f"fastadapt bench prompt_learner --quick --json {tmp_path}"
