import numpy as np
from PIL import Image

from fastadapt.bench.image_sets import generated_textures, shifted_digits


def test_generated_sets_are_the_same_every_time(tmp_path):
    first, again = generated_textures(tmp_path / "a"), generated_textures(tmp_path / "b")
    assert len(first.paths) == 240 and first.classes == again.classes
    assert np.bincount(first.labels).tolist() == [90, 30, 90, 30]  # marks are rare
    for one, two in zip(first.paths[::60], again.paths[::60], strict=True):
        with Image.open(one) as a, Image.open(two) as b:
            assert np.array_equal(np.asarray(a), np.asarray(b)) and a.size == (160, 160)


def test_digits_are_another_domain(tmp_path):
    found = shifted_digits(tmp_path)
    assert len(found.paths) == 899 and found.classes == tuple("0123456789")
    with Image.open(found.paths[0]) as image:
        assert image.size == (96, 96) and np.asarray(image).std() > 10
