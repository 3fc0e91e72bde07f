"""A command imports PyTorch's compiler only if something compiles."""

import subprocess
import sys

PROGRAM = """
import os, sys
from fastadapt.no_compiler import leave_compiler_out
assert leave_compiler_out()
import torch, timm
p = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([p])
p.sum().backward()
optimizer.step()
optimizer.zero_grad()
assert p[0] < 1
assert type(sys.modules["torch._dynamo"]).__name__ == "_StandIn"
assert "sympy" not in sys.modules
assert not leave_compiler_out()  # too late
for name, then in {asked}.items():
    child = os.fork()
    if child == 0:
        exec(then)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
ASKED = {
    "compile": """
f = torch.compile(lambda x: x + 1, backend="eager")
assert f(torch.ones(2)).tolist() == [2, 2]
assert torch._dynamo.is_compiling() is False
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
""",
    "module": """
import torch._dynamo.config as config
assert config.__spec__.name == "torch._dynamo.config"
import torch._dynamo
assert torch._dynamo.config is config
from torchvision.ops.roi_align import is_compile_supported
assert isinstance(is_compile_supported("cpu"), bool)
""",
}


def test_it_is_left_out_until_it_is_asked_for():
    subprocess.run([sys.executable, "-c", PROGRAM.format(asked=ASKED)], check=True)
