"""Which backend runs a call, on which GPU, and that kernels compile for each of them."""

from __future__ import annotations

import pytest
import torch

from fastadapt.kernels import BackendError, cluster_attention
from fastadapt.kernels.common import dispatch
from tests.helpers.kernel_checks import INTERPRETING

X = torch.ones(2, 3, 3)
HOPPER = {
    "hopper_project_kernel",
    "hopper_transform_kernel",
    "hopper_project_backward_kernel",
    "hopper_expand_backward_kernel",
    "hamilton_product_kernel",
    "product_gelu_kernel",
}
ARGS = (X, torch.ones(3, 2), torch.ones(2, 3, 3))


@pytest.mark.parametrize("value", ["", "tritn", "Triton", "cuda"])
def test_a_wrong_environment_variable_is_named(value, monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", value)
    message = f"FASTADAPT_BACKEND is '{value}'; expected one of auto, triton, reference"
    with pytest.raises(BackendError, match=message):
        cluster_attention(*ARGS)
    # What the caller names is not the environment's.
    assert cluster_attention(*ARGS, backend="reference").shape == X.shape


@pytest.mark.parametrize("value", ["", "tritn"])
def test_a_wrong_argument_is_named(value):
    with pytest.raises(ValueError, match=f"^backend is '{value}'; expected one of auto"):
        cluster_attention(*ARGS, backend=value)


def test_the_environment_variable_takes_the_place_of_auto(monkeypatch):
    for value in dispatch.BACKENDS:
        monkeypatch.setenv("FASTADAPT_BACKEND", value)
        expected = "reference" if value == "reference" else "triton"
        assert dispatch.choose_backend("auto", None) == expected
    assert dispatch.choose_backend("triton", None) == "triton"


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 5), None, "compute capability 7.5; they need 8.0"),
        ((8, 0), None, None),
        ((8, 6), None, None),
        ((8, 9), None, None),
        ((9, 0), None, None),
        ((10, 0), None, None),
        ((12, 0), None, None),
        ((9, 4), "6.4.43482", "ROCm 6.4.43482"),  # an MI300
        ((11, 0), "7.0.0", "ROCm 7.0.0"),  # an RX 7900
    ],
)
def test_which_gpus_the_kernels_run_on(capability, hip, reason):
    found = dispatch.why_not_gpu(capability, hip)
    assert found is None if reason is None else reason in found


def test_what_a_gpu_has():
    pytest.importorskip("triton")
    from fastadapt.kernels.common.launcher import Device

    found = {
        major: (
            device.has_warp_group_products,
            device.has_dependent_launch,
            device.has_tall_products,
        )
        for major in (0, 8, 9, 10, 12)
        for device in [Device(0, 132, 232_448, major)]
    }
    none, every = (False,) * 3, (True,) * 3
    expected = {0: none, 8: none, 9: every, 10: (False, True, True), 12: (False, True, False)}
    assert found == expected


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("target", [80, 89, 90, 100, 120])
def test_kernels_compile_without_the_gpu(target, tmp_path):
    """To machine code, where the GPU has shared memory enough; tools/compare_ptx.py does more.

    To Triton an RTX 3090 is an RTX 4090: only what it launches otherwise is compiled for it.
    """
    pytest.importorskip("triton")
    from tests.helpers import compiled_kernels as gpus

    for capability in (89, 86) if target == 89 else (target,):
        device_has = gpus.GPUS[capability][1]
        kernels = set()
        for name, call in gpus.calls(few=True).items():
            if capability != 90 and name.startswith("quaternion_linear(8, "):
                continue  # smaller blocks of a kernel that more rows launch there, too
            for launch in gpus.compiled(
                call, capability, assemble=True, cache=tmp_path, target=target
            ):
                assert launch.shared <= device_has, (name, launch.kernel, launch.shared)
                assert not launch.unfinished, (name, launch.kernel)
                kernels.add(launch.kernel)
        assert len(kernels) >= 12
        assert kernels & HOPPER == (HOPPER if capability == 90 else set())
