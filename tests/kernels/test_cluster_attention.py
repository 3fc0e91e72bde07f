"""Cluster attention: the reference, and the kernels in the interpreter.

The interpreter is chosen before Triton is imported, so its cases run in a process of their own:
``python -m pytest`` on this file with TRITON_INTERPRET=1, started by ``test_interpreter.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastadapt.kernels import (
    BackendError,
    center_attention,
    cluster_attention,
    cluster_attention_reference,
)
from tests.helpers.cluster_attention_cases import assert_as_exact_as_pytorch, make
from tests.helpers.kernel_checks import (
    INTERPRETING,
    interpreted,
    output_and_gradients,
)

# The reference


@pytest.mark.parametrize("token", [False, True])
def test_gradcheck(token):
    args, _ = make(2, 5, 6, 4, 3, torch.float64, token=token)
    leaves = [t.requires_grad_() for t in args]
    assert torch.autograd.gradcheck(cluster_attention_reference, leaves)


def test_reference_is_upstream():
    args, _ = make(3, 7, 12, 8, 4, torch.float64)
    x, centers, transforms, down_w, down_b, up_w, up_b = args
    a = (F.normalize(x.mean(1), dim=-1) @ F.normalize(centers, dim=0)).softmax(-1)
    mixed = (a[:, :, None, None] * transforms.expand(3, -1, -1, -1)).sum(1)
    y = F.linear(F.linear(x, down_w, down_b) @ mixed, up_w, up_b)
    torch.testing.assert_close(cluster_attention_reference(*args), y)
    torch.testing.assert_close(center_attention(x, centers), a)


def test_auto_on_the_cpu_is_the_reference():
    args, _ = make(2, 5, 8, 4, 3, torch.float32)
    torch.testing.assert_close(
        cluster_attention(*args), cluster_attention_reference(*args), rtol=0, atol=0
    )


@pytest.mark.skipif(INTERPRETING, reason="there the kernels do run on the CPU")
def test_triton_on_the_cpu_says_why_not():
    args, _ = make(2, 5, 8, 4, 3, torch.float32)
    with pytest.raises(BackendError, match="cpu"):
        cluster_attention(*args, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 8)}, "x has shape"),
        ({1: torch.zeros(9, 3)}, "centers has shape"),
        ({2: torch.zeros(3, 5, 4)}, "transforms has shape"),
        ({3: torch.zeros(4, 9)}, "down_weight has shape"),
        ({4: torch.zeros(5)}, "down_bias has shape"),
        ({5: None}, "go together"),
        ({3: None, 5: None}, "takes no biases"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    args, _ = make(2, 5, 8, 4, 3, torch.float32)
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        cluster_attention(*args)


PROGRAM = """
import sys
{block}
import torch
import fastadapt
from fastadapt.kernels import cluster_attention

for name in fastadapt.kernels.__all__:
    getattr(fastadapt.kernels, name)
y = cluster_attention(torch.ones(2, 3, 3), torch.ones(3, 2), torch.ones(2, 3, 3))
assert y.shape == (2, 3, 3)
ours = [m for m in sys.modules if m.startswith("fastadapt.kernels.")]
print(*[m for m in ours if any(k in m for k in ("triton_", "hopper_", "launch", "plan_"))])
"""


@pytest.mark.parametrize("block", ["", "sys.modules['triton'] = None"])
def test_import_and_reference_need_no_triton(block):
    """Not installed it is not missed, and where it is no kernel is imported before its call."""
    command = [sys.executable, "-c", PROGRAM.format(block=block)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# The kernels in the interpreter. bf16 products are wrong there, so fp16 and fp32.


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("b", "n", "c", "r", "k"),
    [
        (2, 5, 32, 16, 3),
        (3, 49, 64, 32, 20),  # a tile holds several samples
        (1, 130, 60, 63, 33),  # nothing aligned
        (2, 70, 40, 24, 1),
        (5, 1, 16, 16, 4),
    ],
)
def test_interpreted_channel_mode(b, n, c, r, k, dtype, poisoned_empty):
    assert_as_exact_as_pytorch(*make(b, n, c, r, k, dtype))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n", [10, 17])
def test_interpreted_token_mode(n, dtype, poisoned_empty):
    assert_as_exact_as_pytorch(*make(3, n, 25, None, 4, dtype, token=True))


@interpreted
def test_interpreted_strides_and_no_biases():
    args, _ = make(4, 12, 32, 16, 5, torch.float16)
    args[0] = torch.randn(4, 13, 64).half()[:, 1:, ::2]
    args[2] = args[2].transpose(1, 2)
    args[3] = torch.randn(32, 16).half().t()
    args[4] = args[6] = None
    assert_as_exact_as_pytorch(args, torch.randn(1, 1, 32).half().expand(4, 12, 32))


@interpreted
@pytest.mark.parametrize("asked", range(7))
def test_interpreted_gradients_asked_for_singly(asked):
    args, g = make(2, 9, 24, 16, 3, torch.float16)
    leaves = [t.detach().clone().requires_grad_(i == asked) for i, t in enumerate(args)]
    y = cluster_attention(*leaves, backend="triton")
    (alone,) = torch.autograd.grad(y, leaves[asked], g)
    together = output_and_gradients(lambda *a: cluster_attention(*a, backend="triton"), args, g)
    assert torch.equal(alone, together[1 + asked])


@interpreted
@pytest.mark.parametrize("token", [False, True])
def test_interpreted_opcheck(token):
    args, _ = make(2, 9, 24, 16, 3, torch.float16, token=token)
    args = [t.requires_grad_() for t in args] + [None] * (7 - len(args))
    torch.library.opcheck(torch.ops.fastadapt.cluster_attention.default, (*args, True))
