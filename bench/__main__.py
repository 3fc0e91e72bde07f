"""``python -m fastadapt.bench``: the same as ``fastadapt bench``."""

import sys

from fastadapt.cli import main

if __name__ == "__main__":  # processes that a benchmark starts import this file, too
    sys.argv.insert(1, "bench")
    main()
