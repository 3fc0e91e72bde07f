import pytest
import torch

from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError

PLAIN = Preprocess((3, 32, 32), crop_pct=1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"crop_pct": 0}, {"crop_pct": 2}, {"crop_mode": "left"}, {"interpolation": "cubic"}, {"x": 1}],
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
