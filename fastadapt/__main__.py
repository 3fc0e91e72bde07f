"""``python -m fastadapt``: the command line, where the script is not on the path."""

from fastadapt.cli import main

main()
