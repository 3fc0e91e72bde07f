"""Start the command line: Ctrl-C is answered before anything else is imported."""

import atexit
import os
import sys

from fastadapt import interrupt


def main() -> None:
    """Run the command line. Entry point of ``fastadapt`` and ``python -m fastadapt``."""
    interrupt.install()
    from fastadapt.cli import main as run

    try:
        run()
    except SystemExit as end:
        if end.code in (None, 0) and _used_a_gpu():
            # Everything is written. Taking thousands of modules apart takes another second.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise


def _used_a_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


if __name__ == "__main__":  # processes that a command starts import this file, too
    main()
