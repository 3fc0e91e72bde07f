"""What is freed is kept: asking for it again costs no pages."""

import json
import resource
import subprocess
import sys

import pytest

from fastadapt import host_memory

# In a process of its own: the setting stays for its whole life.
PAGES = """
import json, resource, torch
from fastadapt.host_memory import keep_freed_memory
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before, kept = pages(), keep_freed_memory()
pages(), pages()  # the heap grows to what it needs
print(json.dumps([before, kept, pages()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what it sets is GNU's C library's")
def test_what_is_freed_is_found_again():
    out = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, check=True).stdout
    before, kept, after = json.loads(out)
    size = 8 * 2**24 // resource.getpagesize()
    if not kept or before < size // 512:  # pages of 2 MiB at most
        pytest.skip("another C library, or one that keeps such blocks anyway")
    assert after < before / 8


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert host_memory.keep_freed_memory() is False
