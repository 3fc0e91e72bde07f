"""The operations under pytest-benchmark."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_pytest_benchmark_has_every_operation():
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-p", "no:xdist"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "-p", "no:cacheprovider"]
    # A worker of xdist's would switch benchmarks off.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("cluster_attention", "quaternion_linear", "cladapter", "prompt_learner"):
        assert f"test_{name}[" in done.stdout
