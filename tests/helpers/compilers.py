"""What tests that compile C++ share."""

import pytest

from fastadapt.errors import InputError


def build_or_skip(build, *args, **kwargs):
    """Build a .pt2; skip the test where the C++ compiler cannot link what AOTInductor makes."""
    try:
        return build(*args, **kwargs)
    except InputError as error:
        if "linked its own library statically" not in str(error):
            raise
        pytest.skip(f"this machine's C++ compiler: {error}")
