import json

import pytest
import torch

from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError

PLAIN = Preprocess((3, 32, 32), crop_pct=1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"crop_pct": 0}, {"crop_pct": 2}, {"crop_pct": "1"}, {"crop_pct": 1e-5}, {"x": 1}),
        *({"crop_mode": "left"}, {"interpolation": "cubic"}, {"mean": [0.5] * 4}, {"mean": 0.5}),
        *({"std": [1, 1, 0]}, {"std": [1, 1, float("nan")]}, {"std": [True, 1, 1]}),
        *(
            {"input_size": size}
            for size in (7, [3, 32], [3, 32, 0.5], [3, 32, -32], [3, 32, 2**20])
        ),
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Preprocess.from_dict({"input_size": [3, 32, 32], **wrong})


def test_dictionary_and_back():
    assert Preprocess.from_dict(PLAIN.to_dict()) == PLAIN


def test_normalize():
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(PLAIN.mean)) / torch.tensor(PLAIN.std)
    assert torch.allclose(PLAIN.normalize(images)[0, :, 0, 0], expected)


@pytest.mark.parametrize(
    "value", [[0], [1, 0], [0, float("inf")], ["0", "1"], 5, [True, 2], "auto"]
)
def test_impossible_intensity_ranges_are_refused(value):
    with pytest.raises(InputError, match="intensity_range"):
        Preprocess.from_dict({"input_size": [3, 32, 32], "intensity_range": value})


def test_an_intensity_range_survives_a_file():
    plain = Preprocess((3, 32, 32), intensity_range=(-1000.0, 2000.5))
    assert Preprocess.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    old = {key: value for key, value in PLAIN.to_dict().items() if key != "intensity_range"}
    assert Preprocess.from_dict(old) == PLAIN  # of a version without the setting
