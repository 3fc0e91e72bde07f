"""Batches are decoded ahead: in order, with bounded memory, whatever cannot be read."""

import numpy as np
import pytest
from PIL import Image

from fastadapt.data.decode_pool import Reading
from fastadapt.data.resize import Geometry
from fastadapt.export.predict import decode_ahead
from fastadapt.export.predict.decode_ahead import compute, open_decoder

SIZES = ((8, 6), (5, 9), (8, 6), (7, 7))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(37):
        Image.new("L", SIZES[index % 4], index).save(folder / f"{index:02}.png")
    (folder / "05.png").write_text("no image")
    (folder / "30.png").unlink()
    return [str(folder / f"{index:02}.png") for index in range(37)]


def levels(pixels):
    return pixels.reshape(len(pixels), -1)[:, :2]


@pytest.mark.parametrize("reading", [Reading(Geometry(4, 4, "bilinear")), None])
@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("held", [100, 10**9])
def test_order_and_problems(paths, reading, batch, held, monkeypatch):
    monkeypatch.setattr(decode_ahead, "HELD_BYTES", held)
    batches = [paths[i : i + batch] for i in range(0, len(paths), batch)]
    found, problems = {}, {}
    with open_decoder(reading, None, batch, 2) as decode:
        for number, decoded in enumerate(decode(iter(batches))):
            computed = compute(decoded, levels, 2)
            assert computed.rows == sorted(computed.rows)
            for place, values in zip(computed.rows, computed.values, strict=True):
                found[number * batch + place] = values
            problems |= {number * batch + i: why for i, why in computed.problems.items()}
    assert sorted(problems) == [5, 30]
    assert "05.png cannot be read as an image" in problems[5]
    assert "30.png does not exist" in problems[30]
    assert sorted(found) == [i for i in range(37) if i not in problems]
    assert all((values == index).all() for index, values in found.items())


@pytest.mark.parametrize("reading", [Reading(Geometry(4, 4, "bilinear")), None])
def test_paths_are_taken_only_as_needed(paths, reading):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield [paths[0]] * 3

    with open_decoder(reading, None, 3, 2) as decode:
        decoded = decode(endless())
        for _ in range(5):
            assert compute(next(decoded), levels, 2).values.shape == (3, 2)
    assert len(taken) <= 5 + decode_ahead.AHEAD


def test_a_batch_without_any_image(paths):
    with open_decoder(Reading(Geometry(4, 4)), None, 2, 1) as decode:
        (decoded,) = decode([[paths[5], paths[30]]])
        computed = compute(decoded, levels, 2)
    assert computed.rows == [] and computed.values.shape == (0, 2)
    assert computed.values.dtype == np.float32 and len(computed.problems) == 2
