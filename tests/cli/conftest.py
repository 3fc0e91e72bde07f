"""Run the command line in this process."""

import sys

import pytest

from fastadapt import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """Give a function from arguments to exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return call
