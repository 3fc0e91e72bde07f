import pytest

from fastadapt.data.dataset import read_dataset
from fastadapt.data.scan import find_unreadable
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, truncate


def test_unreadable_images_are_found(tmp_path):
    root = make_folders(tmp_path / "data", 4)
    broken = {root / CLASSES[0] / "00.png", root / CLASSES[1] / "01.png"}
    for path in broken:
        truncate(path)
    dataset = read_dataset(root)
    seen = []
    found = find_unreadable(dataset, workers=2, on_image=lambda: seen.append(1))
    assert {path for path, _ in found} == broken
    assert len(seen) == 12
    assert len(dataset.without(broken).samples) == 10
    gone = [s.path for s in dataset.samples if s.label == 0]
    with pytest.raises(InputError, match="'crossed' has no image in the training split"):
        dataset.without(gone)
