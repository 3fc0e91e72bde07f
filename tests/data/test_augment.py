import numpy as np
import pytest
import torch
from PIL import Image

from fastadapt.data.augment import AUGMENTS, check_augment, read_view
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError

PLAIN = Preprocess((3, 32, 32), crop_pct=1.0)


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("augment", AUGMENTS)
def test_views_depend_on_their_seed_alone(photo, augment):
    plain = read_view(photo, PLAIN, augment)
    views = [read_view(photo, PLAIN, augment, (0, 0, number)) for number in range(1, 30)]
    again = [read_view(photo, PLAIN, augment, (0, 0, number)) for number in range(1, 30)]
    assert torch.equal(plain, PLAIN.read(photo))
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    different = {view.numpy().tobytes() for view in views}
    assert len(different) == {"none": 1, "flips": 4, "dihedral": 8, "crops": 29}[augment]
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)


def test_symmetries_keep_every_pixel(photo):
    plain = read_view(photo, PLAIN, "dihedral")
    for number in range(1, 9):
        view = read_view(photo, PLAIN, "dihedral", (0, 0, number))
        assert torch.equal(view.flatten(1).sort().values, plain.flatten(1).sort().values)


def test_augmentations_that_cannot_be():
    with pytest.raises(InputError, match="blur"):
        check_augment("blur", PLAIN)
    with pytest.raises(InputError, match="square"):
        check_augment("dihedral", Preprocess((3, 32, 48)))
