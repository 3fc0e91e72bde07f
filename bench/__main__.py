"""``python -m fastadapt.bench``: the same as ``fastadapt bench``."""

import sys

from fastadapt.cli import main

sys.argv.insert(1, "bench")
main()
