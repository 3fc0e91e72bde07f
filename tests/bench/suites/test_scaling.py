"""Training on several GPUs: tables of what was measured, and the worker that measures steps."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from fastadapt.bench import scaling_worker
from fastadapt.bench.scaling_worker import Found, Plan
from fastadapt.bench.suites import scaling
from fastadapt.processes import VARIABLES


def test_tables_compare_with_one_gpu():
    size = replace(scaling.GPU, weak=64, strong=256)
    found = scaling.Measured(size)
    for processes, ms in ((1, 10.0), (2, 10.5)):
        alone = None if processes == 1 else 10.0
        found.steps += [
            Found(1, processes, 64 * processes, ms, alone, True, 28.0),
            Found(1, processes, 256, 40.0 / processes, alone, True, 28.0),
        ]
        found.epochs[processes] = {1: 5000.0 * processes}
    found.differences = {"1 process and 1 process": 0.0, "2 processes and 1 process": 2e-3}
    tables = found.tables("done")
    one, two = tables.tables[scaling.WEAK]
    assert (one["GPUs"], one["times one GPU"], one["efficiency"]) == (1, "1.00×", "100%")
    assert (two["times one GPU"], two["efficiency"]) == ("1.90×", "95%")
    assert two["epochs, times one GPU"] == "2.00×"
    assert two["images of a GPU's step"] == 64
    assert tables.tables[scaling.STRONG][1]["times one GPU"] == "2.00×"
    assert tables.wrong == ["2 processes and 1 process"]


def test_commands_are_torchrun_for_several():
    assert "torch.distributed.run" not in scaling.command(1, "fastadapt", "train")
    words = scaling.command(4, "fastadapt", "train")
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[-3:] == ["-m", "fastadapt", "train"]


def test_a_failed_process_says_why():
    process = scaling._start([scaling.sys.executable, "-c", "print('fastadapt: no'); exit(3)"])
    with pytest.raises(RuntimeError, match=r"exit code 3: fastadapt: no"):
        scaling._finish(process)


def test_the_worker_times_both_stages(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    data = scaling.write_images(tmp_path / "images", 12)
    out = tmp_path / "found.json"
    plan = Plan(str(data), "test_vit", str(out), (4,), steps=1, repeats=1, image_size=32)
    (tmp_path / "plan.json").write_text(json.dumps(asdict(plan)))
    monkeypatch.setattr(scaling_worker, "WARM", 1)
    monkeypatch.setattr(scaling_worker.sys, "argv", ["worker", str(tmp_path / "plan.json")])
    scaling_worker.main()
    steps = [Found(**item) for item in json.loads(out.read_text())["steps"]]
    assert [(s.stage, s.processes, s.batch) for s in steps] == [(1, 1, 4), (2, 1, 4)]
    assert all(s.milliseconds > 0 and s.alone is None for s in steps)
    assert steps[1].gradients > steps[0].gradients
    assert all(s.captured == torch.cuda.is_available() for s in steps)
