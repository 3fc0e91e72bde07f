"""Plain JPEG files are told from all that a GPU decodes otherwise."""

from fastadapt.data.plain_jpeg import read_plain_jpeg
from tests.helpers.jpegs import PLAIN, write_jpegs


def test_plain_jpegs_are_told_from_others(tmp_path):
    folder = write_jpegs(tmp_path)
    found = {path.name: read_plain_jpeg(path) for path in folder.iterdir()}
    assert {name for name, jpeg in found.items() if jpeg is not None} == PLAIN
    assert found["0.jpg"] == ((folder / "0.jpg").read_bytes(), 60 * 44)
    assert read_plain_jpeg(folder / "not-there.jpg") is None
    # Of values that 8 bits do not have the process says that they are none.
    assert read_plain_jpeg(folder / "0.jpg", (0.0, 4095.0)) is None
    assert read_plain_jpeg(folder / "0.jpg", (5.0, 200.0)) is not None
