import pytest

from fastadapt.data.dataset import read_dataset
from fastadapt.data.scan import scan
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, truncate


def test_unreadable_images_are_found(tmp_path):
    root = make_folders(tmp_path / "data", 4)
    broken = {root / CLASSES[0] / "00.png", root / CLASSES[1] / "01.png"}
    for path in broken:
        truncate(path)
    dataset = read_dataset(root)
    with pytest.raises(InputError, match=r"2 of 12 images cannot be read: .*00\.png.*--skip-unre"):
        scan(dataset, workers=2)
    seen = []
    found = scan(dataset, 2, skip_unreadable=True, on_image=lambda: seen.append(1))
    assert {s.path for s in dataset.samples} - {s.path for s in found.dataset.samples} == broken
    assert len(seen) == 12
    assert "2 of 12 images cannot be read" in found.lines[0]
    gone = [s.path for s in dataset.samples if s.label == 0]
    with pytest.raises(InputError, match="'crossed' has no image in the training split"):
        dataset.without(gone)
