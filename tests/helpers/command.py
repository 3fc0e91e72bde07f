"""The command line, called in this process."""

import sys

import pytest

from fastadapt import cli


def command(monkeypatch, *args):
    """Run the command line and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def contents(folder):
    """Return the content of every file of a folder, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
