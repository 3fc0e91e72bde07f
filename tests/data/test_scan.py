import shutil

import numpy as np
import pytest
import tifffile

from fastadapt.data.dataset import read_dataset
from fastadapt.data.scan import Scan, scan
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, put_image, truncate


def test_processes_find_the_same(tmp_path):
    root = make_folders(tmp_path / "data", 45)
    broken = root / CLASSES[0] / "00.png"
    truncate(broken)
    dataset, seen = read_dataset(root), []
    with Scan(dataset, 2) as begun:
        assert begun.pool is not None
        found = begun.wait(skip_unreadable=True, advance=seen.append)
    assert {s.path for s in dataset.samples} - {s.path for s in found.dataset.samples} == {broken}
    assert sum(seen) == 135
    assert "1 of 135 images cannot be read" in found.lines[0]


def test_unreadable_images_are_found(tmp_path):
    root = make_folders(tmp_path / "data", 4)
    broken = {root / CLASSES[0] / "00.png", root / CLASSES[1] / "01.png"}
    for path in broken:
        truncate(path)
    dataset = read_dataset(root)
    with pytest.raises(
        InputError, match=r"2 of 12 images cannot be read: .*00\.png.*`skip_unreadable=True`"
    ):
        scan(dataset, workers=2)
    seen = []
    found = scan(dataset, 2, skip_unreadable=True, on_image=lambda: seen.append(1))
    assert {s.path for s in dataset.samples} - {s.path for s in found.dataset.samples} == broken
    assert len(seen) == 12
    assert "2 of 12 images cannot be read" in found.lines[0]
    gone = [s.path for s in dataset.samples if s.label == 0]
    with pytest.raises(InputError, match="'crossed' has no image in the training split"):
        dataset.without(gone)


def test_the_same_bytes_under_two_labels_are_refused(tmp_path):
    root = make_folders(tmp_path / "data", 3)
    shutil.copy(root / CLASSES[0] / "00.png", root / CLASSES[1] / "zzz.png")
    with pytest.raises(InputError, match=r"1 image stands under two labels.*'crossed'.*'lying'"):
        scan(read_dataset(root), 1)


def test_the_same_bytes_in_two_splits_are_warned_of(tmp_path):
    for split in ("train", "val", "test"):
        make_folders(tmp_path / split, 3)
    found = scan(read_dataset(tmp_path), 2)
    warnings = [line for line in found.lines if line.startswith("warning")]
    assert "9 of 9 val images have the same bytes as training images" in warnings[0]
    assert "9 of 9 test images have the same bytes as training images" in warnings[1]
    assert "val and of test" in warnings[2]
    assert found.dataset == read_dataset(tmp_path)


def test_copies_are_not_drawn_for_validation(tmp_path):
    root = make_folders(tmp_path / "data", 10)
    for path in sorted(root.rglob("0[0-4].png")):
        shutil.copy(path, path.with_name(f"{path.stem}-copy.png"))
    dataset = read_dataset(root)
    found = scan(dataset, 2)
    names = {}
    for sample in found.dataset.samples:
        names.setdefault(sample.path.read_bytes(), set()).add(sample.split)
    assert all(len(splits) == 1 for splits in names.values())
    assert found.dataset.split("val")
    moved = len(dataset.split("val")) - len(found.dataset.split("val"))
    assert moved and f"{moved} images drawn for validation train instead" in found.lines[0]


def test_copies_in_one_split_under_one_label_are_no_matter(tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        make_folders(tmp_path / split, 3, seed=seed)
    path = tmp_path / "train" / CLASSES[0] / "00.png"
    shutil.copy(path, path.with_name("copy.png"))
    assert scan(read_dataset(tmp_path), 1).lines == []


def test_what_is_dropped_is_said_once_by_kind(tmp_path):
    root = make_folders(tmp_path, 3)
    for index in range(2):
        stack = np.random.default_rng(index).integers(0, 255, (4, 16, 16)).astype(np.uint8)
        tifffile.imwrite(root / CLASSES[0] / f"z{index}.tif", stack, photometric="minisblack")
    (line,) = scan(read_dataset(root), 2).lines
    assert line.startswith("warning: 2 of 11 images lose pages after the first")
    assert line.endswith("z0.tif)")


def deep_set(root, low=734, high=2639):
    """Write 16-bit TIFFs of two classes, one darker than the other."""
    for split, seed in (("train", 0), ("val", 1)):
        rng = np.random.default_rng(seed)
        for label in ("bright", "dark"):
            (root / split / label).mkdir(parents=True)
            for index in range(3):
                values = rng.integers(low, high + 1, (16, 16)).astype(np.uint16)
                values[0, :2] = low, high
                tifffile.imwrite(root / split / label / f"{index}.tif", values)
    return root


@pytest.mark.parametrize(
    ("setting", "right"),
    [("auto", (0, 4095)), ("700:2700", (700, 2700)), ("0%:100%", (734, 2639)), ("dtype", None)],
)
def test_the_intensity_range_is_found_of_training_images(tmp_path, setting, right):
    root = deep_set(tmp_path)
    tifffile.imwrite(root / "val" / "dark" / "x.tif", np.full((8, 8), 60000, np.uint16))
    found = scan(read_dataset(root), 2, setting)
    assert found.value_range == right
    (line,) = found.lines
    if right is None:
        assert "largest value is 2639" in line and "intensity range to auto" in line
    else:
        assert f"{right[0]} becomes black, {right[1]} white ({setting})" in line


def test_floating_point_values_need_a_range(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(4):
            values = np.random.default_rng(index).normal(0, 1, (9, 9)).astype(np.float32)
            tifffile.imwrite(
                tmp_path / label / f"{index}.tif", values + len(label) * (label == "b")
            )
    dataset = read_dataset(tmp_path)
    with pytest.raises(InputError, match=r"8 of 8 images cannot be read.*LOW:HIGH"):
        scan(dataset, 1)
    assert scan(dataset, 1, "-2:2").value_range == (-2, 2)
    low, high = scan(dataset, 1, "1%:99%").value_range
    assert -4 < low < -1 and 1 < high < 4


def test_images_of_two_depths_have_no_one_range(tmp_path):
    root = deep_set(tmp_path)
    put_image(root / "val" / "dark" / "x.png")
    dataset = read_dataset(root)
    with pytest.raises(InputError, match=r"different kinds \(.*1 8-bit unsigned.*0:4095"):
        scan(dataset, 1, "auto")
    with pytest.raises(InputError, match=r"x\.png has 8 bits"):
        scan(dataset, 1, "0:4095")
    assert scan(dataset, 1).value_range is None
