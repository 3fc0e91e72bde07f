import pytest

from fastadapt.data.dataset import read_dataset
from fastadapt.data.formats import is_image_file
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders


def test_image_files_by_name(tmp_path):
    names = ("a.png", "b.JPG", "c.tiff", ".hidden.png", "notes.txt")
    assert [is_image_file(tmp_path / n) for n in names] == [True, True, True, False, False]


def folder_case(name):
    def make(tmp_path):
        root = tmp_path / "data"
        root.mkdir()
        if name == "flat":
            make_folders(tmp_path / "more", 1, CLASSES[:1])
            (tmp_path / "more" / CLASSES[0] / "00.png").rename(root / "00.png")
        elif name == "no images":
            (root / "a").mkdir()
            (root / "a" / "notes.txt").write_text("")
        elif name == "one class":
            make_folders(root / "x", 3, CLASSES[:1])
            return root / "x"
        elif name == "single image":
            make_folders(root / "x", 1)
            return root / "x"
        elif name == "empty class":
            make_folders(root / "x", 2)
            (root / "x" / "nothing").mkdir()
            return root / "x"
        elif name == "unknown split folder":
            for split in ("train", "val", "holdout"):
                make_folders(root / split, 1)
        elif name == "class missing in train":
            make_folders(root / "train", 2, CLASSES[:2])
            make_folders(root / "val", 1)
        return root

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp_path: tmp_path / "nowhere", "does not exist"),
        (folder_case("empty"), "holds no folders"),
        (folder_case("flat"), "holds no folders"),
        (folder_case("no images"), "holds no images"),
        (folder_case("one class"), "one class only, 'crossed'"),
        (folder_case("single image"), "'crossed' has a single training image"),
        (folder_case("empty class"), "class 'nothing'"),
        (folder_case("unknown split folder"), "holdout"),
        (folder_case("class missing in train"), "'upright' has no image in the training split"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        read_dataset(make(tmp_path))
