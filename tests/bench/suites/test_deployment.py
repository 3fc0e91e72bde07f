import numpy as np
import pytest
import torch

import fastadapt as fa
from fastadapt.bench import harness
from fastadapt.bench.suites import deployment
from fastadapt.export.precision.fp8 import Float8Linear
from fastadapt.export.runtimes import load_runtime
from tests.helpers.shallow_vit import SHALLOW_VIT

SUBJECTS = (
    deployment.Subject("ViT", SHALLOW_VIT, 1e9, {8: (7_100, 8_000)}, {8: (14_000,)}),
    deployment.Subject("ConvNeXt", "test_convnext", 1e9, attention=False),
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The benchmark with small models, on any device, compiling nothing."""
    monkeypatch.setattr(deployment, "SUBJECTS", SUBJECTS)
    monkeypatch.delenv(deployment.CHOICE, raising=False)
    monkeypatch.setattr(deployment, "SIZE", 160)
    monkeypatch.setattr(deployment, "BATCHES", (1, 8))
    monkeypatch.setattr(deployment, "LATENCY_CALLS", 5)
    monkeypatch.setattr(harness, "floor", lambda flops, moved: 1.0)
    times = deployment.images_per_second
    monkeypatch.setattr(deployment, "images_per_second", lambda c, b: times(c, b, seconds=0.01))
    monkeypatch.setattr(deployment, "_prepare_all", lambda parts, folder: ["nothing prepared"])


def keep(monkeypatch, **others):
    """Runs the two eager baselines, and ``others``."""
    providers = deployment.providers

    def some(subject, folder):
        found = providers(subject, folder)
        eager = {name: found[name] for name in list(found)[:2]}
        return eager | others

    monkeypatch.setattr(deployment, "providers", some)


def test_baselines_agree_and_are_timed(small, monkeypatch):
    keep(monkeypatch)
    first, *_, result = deployment.run()
    names = ["upstream, AMP bf16, eager", "bf16, eager"]
    assert first.left_out == [
        f"{subject}, {name}: the run ended before it"
        for subject in ("ViT", "ConvNeXt")
        for name in names
    ]
    assert result.left_out == [] and result.wrong == []
    assert result.progress.startswith("ConvNeXt, bf16, eager: ")
    assert result.summary == [f"{subject}, {deployment.SPEED}" for subject in ("ViT", "ConvNeXt")]
    for subject in ("ViT", "ConvNeXt"):
        speeds = result.tables[f"{subject}, {deployment.SPEED}"]
        targets = [deployment.TARGET, deployment.FP8_TARGET] if subject == "ViT" else []
        assert [row["runtime"] for row in speeds] == [*names, deployment.BEST, *targets]
        for row in speeds[:2]:
            assert [*row] == ["runtime", "1", "8", "p50, ms", "p99, ms"]
        for row in speeds[3:]:
            assert [*row] == ["runtime", "8"]
        rows = result.tables[f"{subject}, {deployment.AGREEMENT}"]
        assert {row["batch"] for row in rows} == {1, 8}
        assert {row["passed"] for row in rows} == {"yes"}


def test_what_is_wrong_or_fails_is_not_timed(small, monkeypatch):
    def wrong():
        return lambda images: torch.rand(len(images), deployment.CLASSES)

    def fails():
        raise RuntimeError("no such GPU\nat line 3")

    others = {
        "AOTInductor bf16": deployment.Provider("bf16", None, wrong),
        "ONNX": deployment.Provider("fp16", None, fails),
    }
    keep(monkeypatch, **others)
    *_, result = deployment.run(quick=False)
    assert result.wrong == [
        f"{subject}, AOTInductor bf16, batch {batch}"
        for subject in ("ViT", "ConvNeXt")
        for batch in (1, 5, 8)
    ]
    speeds = result.tables[f"ViT, {deployment.SPEED}"]
    found = {row["runtime"]: row for row in speeds}
    assert "AOTInductor bf16" not in found and "ONNX" not in found
    assert found[deployment.TARGET]["8"] == "7,100 / 8,000: missed"
    assert "ViT, ONNX: not measured, RuntimeError: no such GPU at line 3" in result.notes


def test_a_choice_runs_and_prepares_that_alone(small, monkeypatch):
    prepared = []
    monkeypatch.setenv(deployment.CHOICE, "convnext.*onnx")
    monkeypatch.setattr(deployment, "_prepare_all", lambda parts, _: prepared.extend(parts) or [])
    first = next(deployment.run())
    assert prepared == [(SUBJECTS[1], "onnx")]
    assert [line.partition(":")[0] for line in first.left_out] == [
        "ConvNeXt, ONNX Runtime fp16, I/O binding",
        "ConvNeXt, ONNX Runtime fp16, CUDA graph",
    ]
    monkeypatch.setenv(deployment.CHOICE, "(")
    with pytest.raises(fa.InputError, match=r"FASTADAPT_DEPLOYMENT is '\('"):
        next(deployment.run())
    monkeypatch.setenv(deployment.CHOICE, "warp")
    with pytest.raises(fa.InputError, match="FASTADAPT_DEPLOYMENT chooses nothing"):
        next(deployment.run())


def test_compilers_share_a_pool(small):
    everything = {subject: deployment.providers(subject, None) for subject in SUBJECTS}
    parts = deployment._parts(everything, (1, 8))
    assert [part for _, part in parts[:6]] == ["fp8", "fp8", "aoti", "aoti", "onnx", "onnx"]
    assert len(parts) == len(set(parts)) == 14


@pytest.mark.parametrize(
    ("bf16", "fp8", "met", "met_in_fp8"),
    [
        (7_000.0, 14_500.0, "7,100 / 8,000: missed", "14,000: met"),
        (7_500.0, 8_500.0, "7,100 / 8,000: first met", "14,000: missed"),
        (14_500.0, 7_000.0, "7,100 / 8,000: met", "14,000: missed"),
    ],
)
def test_fp8_meets_a_target_of_its_own(small, bf16, fp8, met, met_in_fp8):
    results = deployment.Results(SUBJECTS[0], (8,))
    for name, speed in {"AOTInductor bf16": bf16, "AOTInductor fp8": fp8}.items():
        results.speeds[name], results.times[name] = {8: speed}, {}
    *_, target, target_in_fp8 = results.tables()[f"ViT, {deployment.SPEED}"]
    assert (target["8"], target_in_fp8["8"]) == (met, met_in_fp8)


def test_fp8_has_bounds_of_its_own(small):
    images = deployment.make_images(4)
    with torch.no_grad():
        want = deployment.with_graph_input(deployment.make_model(SUBJECTS[0]))(images)
    spread = want.var(dim=0, correction=0).mean().sqrt()

    def call(images):
        return want * (1 + 0.2 * spread / want.abs().max())

    for precision, passed in (("bf16", False), ("fp8", True)):
        ((parity, same),) = deployment.check(call, images, want.numpy(), precision, [4])
        assert (parity.passed, same) == (passed, 1.0)
    assert deployment.BOUNDS["bf16"] == deployment.THRESHOLDS["bf16"]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.title)
def test_fp8_is_prepared(small, tmp_path, monkeypatch, subject):
    built = []
    monkeypatch.setattr(deployment, "check_gpu", lambda: None)
    monkeypatch.setattr(
        deployment,
        "build_aoti",
        lambda model, example, path, *_, precision: built.append((model, path, precision)),
    )
    deployment.prepare(subject, "fp8", str(tmp_path))
    ((model, path, precision),) = built
    assert (path.name, precision) == ("model.fp8.pt2", "fp8")
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    assert len(layers) == {"ViT": 10, "ConvNeXt": 18}[subject.title]
    images = deployment.make_images(4)
    with torch.no_grad():
        want = deployment.with_graph_input(deployment.make_model(subject))(images).numpy()
        ((parity, same),) = deployment.check(model, images, want, "fp8", [4])
    assert parity.passed and same == 1


def test_onnx_is_prepared(small, tmp_path):
    assert deployment.prepare(SUBJECTS[0], "onnx", str(tmp_path)) > 0
    runtime = load_runtime(tmp_path / deployment.ONNX, device="cpu")
    images = deployment.make_images(4)
    with torch.no_grad():
        want = deployment.with_graph_input(deployment.make_model(SUBJECTS[0]))(images).numpy()
    assert np.abs(runtime(images).numpy() - want).max() < 0.05 * want.std(axis=0).max()
