"""What an error says is one line, whatever it quotes."""

import pickle

import pytest

import fastadapt as fa
from fastadapt.errors import counted, form


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


def test_numbers_and_nouns():
    assert counted(1, "image") == "1 image" and counted(0, "image") == "0 images"
    assert counted(2, "class", "classes") == "2 classes" and form(1, "loses", "lose") == "loses"
