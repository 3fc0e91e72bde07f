"""Ctrl-C at any moment is one line and exit code 130."""

import random
import signal
import subprocess
import sys
import time

import pytest

from fastadapt import interrupt

# The first line of stdout says that the entry point has begun.
START = """
import sys, fastadapt.__main__ as entry
sys.argv = ["fastadapt", *sys.argv[1:]]
print("started", flush=True)
entry.main()
"""


def interrupted(after, *args):
    """Send SIGINT some seconds after the start; give exit code, stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    # Until main() has taken over there is nothing to be tested.
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


@pytest.mark.parametrize("seed", range(6))
def test_while_it_imports(tmp_path, seed):
    """Without a data set, ``train`` would end with an error of its own, after its imports."""
    after = 0.02 + random.Random(seed).random() * 0.8
    args = ("train", str(tmp_path / "none"), "--backbone", "test_vit", "--out", str(tmp_path / "r"))
    code, out, err = interrupted(after, *args)
    assert "Traceback" not in err and err.count("\n") == 1, err
    if code != 130:  # it was quicker; while Python ends, the signal has its default action again
        assert code in (1, -signal.SIGINT) and "does not exist" in err
    else:
        assert err == "fastadapt: interrupted\n" and out == ""


@pytest.mark.parametrize("when", ["working", "swallowed", "turned", "destructor"])
def test_whatever_libraries_make_of_it(when):
    code = {
        "working": "signal.raise_signal(signal.SIGINT)",
        "swallowed": "\n".join(
            [
                "try: signal.raise_signal(signal.SIGINT)",
                "        except BaseException: raise OSError('disk')",
            ]
        ),
        "turned": "\n".join(
            [
                "try: signal.raise_signal(signal.SIGINT)",
                "        except BaseException: raise ImportError('numpy') from None",
            ]
        ),
        "destructor": "D()",
    }[when]
    program = f"""
import signal, sys
from fastadapt import cli, interrupt
interrupt.install()
class D:
    def __del__(self): signal.raise_signal(signal.SIGINT)
def app(**options):
    with interrupt.working():
        {code}
cli.app = app
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "fastadapt: interrupted\n"


def test_python_programs_keep_their_handler():
    before = signal.getsignal(signal.SIGINT)
    with interrupt.working():
        assert signal.getsignal(signal.SIGINT) is before
    assert not interrupt.came()
