"""Commands of Python in processes that have the large packages imported, for tests of many."""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

IMPORTS = [
    *("torch", "torch._dynamo", "timm", "open_clip", "sklearn", "hypothesis", "pytest"),
    *("fastadapt.cli", "fastadapt.train.run"),
]


def run(
    arguments: Sequence[str], *, stdout, stderr, env: Mapping[str, str], check: bool, timeout: float
) -> SimpleNamespace:
    """Run as :func:`subprocess.run` a Python of a file, of ``-m`` a module, or of ``-c`` code.

    The process is a fork of a fresh one that imported ``IMPORTS``, once for all calls.
    """
    assert arguments[0] == sys.executable and stderr is stdout and not check
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    given = (arguments[1:], stdout.name, dict(env), str(Path.cwd()))
    process = context.Process(target=_run, args=given)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(arguments, timeout)
    return SimpleNamespace(returncode=process.exitcode)


def _run(arguments: Sequence[str], log: str, env: Mapping[str, str], place: str) -> None:
    os.chdir(place)
    multiprocessing.set_start_method("fork", force=True)  # what a fresh process has
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(arguments)
    if arguments[0] in ("-c", "-m"):
        del sys.argv[1 if arguments[0] == "-c" else 0]
    with (
        Path(log).open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            if arguments[0] == "-c":
                exec(arguments[1], {"__name__": "__main__"})
            elif arguments[0] == "-m":
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
