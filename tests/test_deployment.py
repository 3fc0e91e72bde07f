import numpy as np
import pytest
import torch

from fastadapt.bench import deployment, harness
from fastadapt.export.runtimes import load_runtime


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The benchmark with a small model, on any device, compiling nothing."""
    monkeypatch.setattr(deployment, "BACKBONE", "test_vit")
    monkeypatch.setattr(deployment, "SIZE", 160)
    monkeypatch.setattr(deployment, "BATCHES", (1, 8))
    monkeypatch.setattr(deployment, "LATENCY_CALLS", 5)
    monkeypatch.setattr(harness, "floor", lambda flops, moved: 1.0)
    times = deployment.images_per_second
    monkeypatch.setattr(deployment, "images_per_second", lambda c, b: times(c, b, seconds=0.01))
    monkeypatch.setattr(deployment, "_prepare_all", lambda batches, folder: ["nothing prepared"])


def keep(monkeypatch, **others):
    """Runs the two eager baselines, and ``others``."""
    providers = deployment.providers

    def some(folder):
        found = providers(folder)
        eager = {name: found[name] for name in list(found)[:2]}
        return eager | others

    monkeypatch.setattr(deployment, "providers", some)


def test_baselines_agree_and_are_timed(small, monkeypatch):
    keep(monkeypatch)
    first, *_, result = deployment.run()
    assert first["left_out"] == [
        "upstream, AMP bf16, eager: the run ended before it",
        "bf16, eager: the run ended before it",
    ]
    assert result["left_out"] == [] and "bf16, eager: " in result["progress"]
    assert result["wrong"] == []
    speeds = result["tables"][deployment.SPEED]
    assert [row["batch"] for row in speeds] == [1, 8]
    assert {"upstream, AMP bf16, eager", "bf16, eager"} <= set(speeds[0])
    assert [row["runtime"] for row in result["tables"][deployment.LATENCY]] == list(speeds[0])[1:3]
    rows = result["tables"]["agreement with the unfolded fp32 model"]
    assert {row["batch"] for row in rows} == {1, 8}
    assert {row["passed"] for row in rows} == {"yes"}


def test_what_is_wrong_or_fails_is_not_timed(small, monkeypatch):
    def wrong():
        return lambda images: torch.rand(len(images), deployment.CLASSES)

    def fails():
        raise RuntimeError("no such GPU\nat line 3")

    keep(monkeypatch, **{"AOTInductor bf16": ("bf16", wrong), "ONNX": ("fp16", fails)})
    *_, result = deployment.run(quick=False)
    assert result["wrong"] == [f"AOTInductor bf16, batch {batch}" for batch in (1, 5, 8)]
    assert "AOTInductor bf16" not in result["tables"][deployment.SPEED][0]
    assert result["tables"][deployment.SPEED][1]["met"] == "no"
    assert "ONNX: not measured, RuntimeError: no such GPU at line 3" in result["notes"]


def test_onnx_is_prepared(small, tmp_path):
    assert deployment.prepare("onnx", str(tmp_path)) > 0
    runtime = load_runtime(tmp_path / deployment.ONNX, device="cpu")
    images = deployment.make_images(4)
    with torch.no_grad():
        want = deployment._behind_input(deployment.make_model())(images).numpy()
    assert np.abs(runtime(images).numpy() - want).max() < 0.05 * want.std(axis=0).max()
