from pathlib import Path

import numpy as np
from PIL import Image

from fastadapt.train.mistakes import SIDE, Mistakes, draw_mistakes
from tests.helpers.imagesets import put_image


def test_the_surest_mistakes_are_drawn_once_each(tmp_path):
    names = [tmp_path / name for name in ("a.png", "b.png", "c.png", "a.png")]
    for level, path in enumerate(names[:2]):
        put_image(path, 80 + 100 * level)
    labels, predictions = np.array([0, 0, 1, 0]), np.array([1, 0, 0, 1])
    probabilities = np.array([[0.4, 0.6], [0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
    found = Mistakes.find(names, labels, predictions, probabilities)
    assert found == Mistakes((names[0], names[2]), (0, 1), (1, 0), (0.9, 0.8))

    draw_mistakes(tmp_path / "mistakes.png", found, ("fine", "a very long name " * 3))
    with Image.open(tmp_path / "mistakes.png") as picture:
        first = picture.getpixel((SIDE // 2, SIDE // 2))
        assert first == (80, 80, 80)
        assert picture.width > 2 * SIDE and picture.getpixel((1, 1)) == (255, 255, 255)
    nothing = Mistakes.find(names, predictions, predictions, probabilities)
    draw_mistakes(tmp_path / "mistakes.png", nothing, ("fine", "crack"))
    assert not Path(tmp_path / "mistakes.png").exists()
