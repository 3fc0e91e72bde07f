"""``python -m fastadapt``: the command line, where the script is not on the path."""

from fastadapt.cli import main

if __name__ == "__main__":  # processes that a command starts import this file, too
    main()
