"""Flags and numbers in environment variables are read by one rule, and wrong ones are named."""

import pytest

from fastadapt.environment_variables import count, flag
from fastadapt.errors import InputError

NAME = "SOME_FLAG"


def test_flags(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    assert flag(NAME) is False
    for value, expected in {"": False, "0": False, "Off": False, "1": True, " TRUE ": True}.items():
        monkeypatch.setenv(NAME, value)
        assert flag(NAME) is expected
    for value in ("2", "maybe"):
        monkeypatch.setenv(NAME, value)
        with pytest.raises(InputError, match=f"{NAME} is '{value}'; expected 1 or 0"):
            flag(NAME)


def test_numbers(monkeypatch):
    monkeypatch.setenv(NAME, "")
    assert count(NAME, 7) == 7
    monkeypatch.setenv(NAME, "12")
    assert count(NAME, 7) == 12
    for value in ("0", "-3", "1e3", "many", "9" * 5000, "³"):
        monkeypatch.setenv(NAME, value)
        with pytest.raises(InputError, match="expected a whole number, at least 1"):
            count(NAME, 7)


@pytest.mark.parametrize("value", ["0", "", "no", "maybe"])
def test_debugging_that_is_off(value, monkeypatch, capsys):
    from tests.helpers.command import command

    monkeypatch.setenv("FASTADAPT_DEBUG", value)
    assert command(monkeypatch, "verify", "none") == 1
    error = capsys.readouterr().err
    assert error.startswith("fastadapt: ") and error.count("\n") == 1
    assert ("FASTADAPT_DEBUG is 'maybe'" in error) == (value == "maybe")
