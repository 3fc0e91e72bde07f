"""What decodes is chosen by name; a GPU gives the same rows, places and problems as processes."""

import numpy as np
import pytest
import torch

from fastadapt.data.decode_pool import Reading
from fastadapt.data.gpu_decode import GpuDecoder
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError
from fastadapt.export.predict.decode_ahead import PoolDecoder, compute, open_decoder
from fastadapt.export.predict.decoders import decoder_on
from tests.helpers.jpegs import UNREADABLE, write_jpegs

READING = Reading(Geometry(24, 24, "bicubic", 0.875, "center"))
BATCH = 4


def decoded(decoder, paths):
    found, problems = {}, {}
    batches = (paths[i : i + BATCH] for i in range(0, len(paths), BATCH))
    with decoder as decode:
        for number, result in enumerate(decode(batches)):
            computed = compute(result, lambda pixels: pixels.reshape(len(pixels), -1), 24 * 24 * 3)
            values = zip(computed.rows, computed.values, strict=True)
            found |= {number * BATCH + row: value for row, value in values}
            problems |= {number * BATCH + row: why for row, why in computed.problems.items()}
    return found, problems


def check_same(folder, device, tolerance):
    paths = sorted(map(str, write_jpegs(folder).iterdir()))
    expected, problems = decoded(open_decoder(READING, None, BATCH, 1), paths)
    on_gpu = PoolDecoder(READING, BATCH, 1, GpuDecoder(READING, device))
    result, own_problems = decoded(on_gpu, paths)
    assert own_problems == problems and set(result) == set(expected)
    assert {paths[place][-5:] for place in problems} == UNREADABLE
    for place, values in expected.items():
        assert np.abs(result[place] - values).max() <= tolerance, paths[place]


def test_same_rows_places_and_problems(tmp_path):
    check_same(tmp_path, torch.device("cpu"), 2)


@pytest.mark.gpu
def test_same_on_a_gpu(tmp_path):
    check_same(tmp_path, torch.device("cuda"), 6)


def test_a_gpu_is_needed():
    with pytest.raises(InputError, match="computes on a CPU"):
        decoder_on("gpu", "cpu")
    assert decoder_on("cpu", "cpu") is open_decoder
