from dataclasses import replace

import numpy as np
import pytest

from fastadapt.export.artefact import FAILED, UNVERIFIED, VERIFIED, Artefact
from fastadapt.export.bundle import verify_artefact as verify_step
from fastadapt.export.bundle.verify_artefact import Reference, compare_runtime, verify_artefact
from fastadapt.export.settings import Batches


class FakeRuntime:
    name, device, providers = "fake", "cpu", ("fake",)

    def __init__(self, error=0.0):
        self.error, self.sizes = error, []

    def outputs(self, images):
        self.sizes.append(len(images))
        return (self.compute(images),)

    def compute(self, images):
        return images * 2 + self.error


class TestCompare:
    INPUTS = {"images": np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)}  # noqa: RUF012

    def test_full_batches_at_every_size(self):
        runtime = FakeRuntime()
        parities = compare_runtime(
            runtime, Reference(self.INPUTS, 2 * self.INPUTS["images"]), Batches(2, 8, 16)
        )
        assert [(p.batch, p.samples, p.passed) for p in parities] == [
            (2, 6, True),
            (5, 10, True),
            (8, 8, True),
            (16, 16, True),
        ]
        assert runtime.sizes == [2, 2, 2, 5, 5, 8, 16]

    def test_fp64_decides_where_fp32_rounds(self):
        truth = 2 * self.INPUTS["images"]
        rounded = truth + 0.01
        batch, asked = Batches(1, 1, 1), []

        def exact():
            asked.append(1)
            return truth

        with_exact = Reference(self.INPUTS, rounded, exact=exact)
        parities = compare_runtime(FakeRuntime(), with_exact, batch)
        assert parities[0].passed and parities[0].stage == "fake, against fp64"
        assert compare_runtime(FakeRuntime(), replace(with_exact, exact=None), batch)[0].problems
        parities = compare_runtime(FakeRuntime(0.05), with_exact, batch)
        assert not parities[0].passed
        compare_runtime(FakeRuntime(), replace(with_exact, expected=truth), batch)
        assert len(asked) == 2

    def test_limits_are_those_of_the_precision(self):
        reference = Reference(self.INPUTS, 2 * self.INPUTS["images"])
        runtime, batch = FakeRuntime(error=0.03), Batches(1, 1, 1)
        assert not compare_runtime(runtime, reference, batch)[0].passed
        assert compare_runtime(runtime, reference, batch, precision="fp16")[0].passed

    def test_a_batch_that_no_memory_holds_is_not_tried(self, tmp_path, monkeypatch):
        monkeypatch.setattr(verify_step, "load_runtime", lambda *args, **kwargs: FakeRuntime())
        details = {"batch": {"min": 1, "opt": 1, "max": 4096}}
        artefact = Artefact("onnx", "m.onnx", "fp32", VERIFIED, details=details)
        wide = {"images": np.zeros((2, 300_000), np.float32)}
        found = verify_artefact(tmp_path, artefact, Reference(wide, wide["images"]))
        assert found.status == UNVERIFIED and "4096 samples takes 4.9 GB" in found.reason

    @pytest.mark.parametrize("output", [np.float32(1), np.array([["a", "b"]])])
    def test_outputs_that_are_no_rows_of_numbers_fail(self, output):
        runtime = FakeRuntime()
        runtime.compute = lambda images: output
        reference = Reference(self.INPUTS, 2 * self.INPUTS["images"])
        (parity,) = compare_runtime(runtime, reference, Batches(2, 2, 2))
        assert not parity.passed and "\n" not in parity.problems[0]

    def test_a_file_that_does_not_load_fails(self, tmp_path):
        (tmp_path / "m.onnx").write_bytes(b"junk")
        artefact = Artefact("onnx", "m.onnx", "fp32", VERIFIED)
        found = verify_artefact(tmp_path, artefact, Reference(self.INPUTS, self.INPUTS["images"]))
        assert found.status == FAILED
        assert "cannot load m.onnx" in found.reason
