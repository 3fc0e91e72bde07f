"""Prediction's benchmark, with a small model and few images."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastadapt.bench.reporting import tables
from fastadapt.bench.suites import predict
from fastadapt.export.predict import part_maker


def test_decoder_runtime_and_both(monkeypatch):
    monkeypatch.setenv(predict.CHOICE, "alone")
    *_, last = predict.run(quick=True)
    (speeds,) = last.tables.values()
    assert [row["what"] for row in speeds] == ["decoder", "runtime", "predict", "embed"]
    assert all(float(row["images/s"]) > 0 for row in speeds)
    used = "of 1 / (1/decoder + 1/runtime)"
    assert [row[used] is None for row in speeds] == [True, True, False, False]
    assert tables.markdown_table(speeds).count("\n") == 5
    assert last.about == ("one device",)


def test_ratios_are_medians_of_rounds():
    rounds = {
        "decoder": [predict.Timing(100, 10.0), predict.Timing(50, 10.0), predict.Timing(100, 10.0)],
        "runtime": [predict.Timing(300, 4.0), predict.Timing(300, 4.0), predict.Timing(25, 4.0)],
        "predict": [predict.Timing(90, 15.0), predict.Timing(48, 14.0), predict.Timing(20, 28.0)],
        "embed": [predict.Timing(100, 7.0)] * 3,
    }
    *_, found, _ = predict.rows_of(rounds, on_gpu=True)
    assert found["of the slower of both"] == "0.900" and found["images/s"] == "48"
    *_, found, _ = predict.rows_of(rounds, on_gpu=False)
    assert found["of 1 / (1/decoder + 1/runtime)"] == "1.120"
    assert found["CPU time of decoder + runtime over it"] == "0.933"


def test_memory_of_a_tree_of_processes():
    child = "import time; x = bytearray(50 << 20); print(flush=True); time.sleep(60)"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); "
        "p.stdout.readline(); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert 50 << 20 < predict.tree_memory(process.pid) < 200 << 20
    finally:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        process.kill()
        process.wait()


def test_speed_without_what_was_begun_together():
    class Pool:
        def run(self, todo, advance):
            for images in todo:
                advance(images)

    timed, seen = predict.Timed(Pool(), 2), []
    timed.run([3, 4, 5, 6], seen.append)
    assert seen == [3, 4, 5, 6] and timed.images == 11
    assert timed.speed == 11 / (timed.last - timed.first)
    timed = predict.Timed(Pool(), 2)
    timed.run([3, 4], seen.append)
    assert timed.speed is None


def test_ray_on_two_workers(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv(predict.CHOICE, "ray")
    monkeypatch.setattr(part_maker, "PART", 8)
    *_, last = predict.run(quick=True)
    (rows,) = last.tables.values()
    assert [(row["GPUs"], row["images"]) for row in rows] == [("1", "48"), ("2", "96")]
    assert all(float(row["images/s"]) > 0 for row in rows)
