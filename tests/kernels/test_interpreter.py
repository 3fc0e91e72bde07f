"""The kernels of all operations in Triton's interpreter, which runs them on the CPU."""

from pathlib import Path

import pytest

from tests.helpers.kernel_checks import run_interpreted, starts_interpreter

HERE = Path(__file__).parent
FILES = sorted(
    str(path)
    for path in (
        *HERE.glob("*.py"),
        HERE.parent / "export" / "fused" / "test_kernels.py",
        HERE.parent / "fusion" / "test_frozen_blocks.py",
    )
    if "\n@interpreted\n" in path.read_text()
)


@starts_interpreter
@pytest.mark.parametrize("half", [0, 1])
def test_in_the_interpreter(half):
    assert len(FILES) >= 7
    run_interpreted(*FILES[half::2])
