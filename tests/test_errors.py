"""What an error says is one line, whatever it quotes."""

import pickle

import pytest

import fastadapt as fa


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [
        ("a\nb\r\nc", "a\\nb\\r\\nc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\x85b\u2028c", "a\\x85b\\u2028c"),
        ("\ud800", "\\ud800"),
        ("Größe 5 µm, 漢字", "Größe 5 µm, 漢字"),
    ],
)
def test_what_cannot_be_printed_is_escaped(quoted, shown):
    error = fa.InputError(f"no file {quoted}")
    assert str(error) == f"no file {shown}"
    assert str(error).encode("utf-8") and len(str(error).splitlines()) == 1
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
