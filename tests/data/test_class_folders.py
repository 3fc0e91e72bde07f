import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadapt.data.dataset import read_dataset
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, put_image


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


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Training", "validation", "Testing"),
        ("TRAIN", "VALID", "TEST"),
        ("Train", "Val", "Test"),
        ("training_set", "valid_set", "test_set"),
        ("train data", "validation-images", "testset"),
    ],
)
def test_splits_have_any_usual_name_and_case(tmp_path, names):
    for split, count in zip(names, (3, 2, 1), strict=True):
        make_folders(tmp_path / split, count)
    dataset = read_dataset(tmp_path)
    assert dataset.classes == CLASSES
    for split, count in (("train", 9), ("val", 6), ("test", 3)):
        assert len(dataset.split(split)) == count
    assert not dataset.val_drawn


def test_training_and_testing_alone_are_splits(tmp_path):
    for split in ("Training", "Testing"):
        make_folders(tmp_path / split, 4)
    dataset = read_dataset(tmp_path, 0.25)
    assert dataset.classes == CLASSES
    assert [len(dataset.split(s)) for s in ("train", "val", "test")] == [9, 3, 12]
    assert dataset.val_drawn


@pytest.mark.parametrize("name", ["a_train", "trainer", "tests", "value", "testament", "retrain"])
def test_other_names_are_classes(tmp_path, name):
    make_folders(tmp_path, 2, CLASSES[:1])
    shutil.copytree(tmp_path / CLASSES[0], tmp_path / name)
    assert set(read_dataset(tmp_path).classes) == {CLASSES[0], name}


def test_classes_named_like_splits_are_refused(tmp_path):
    make_folders(tmp_path / "flat", 2)
    (tmp_path / "flat" / CLASSES[0]).rename(tmp_path / "flat" / "Train")
    with pytest.raises(InputError, match=r"Train stands among class folders.*split.*CSV"):
        read_dataset(tmp_path / "flat")
    make_folders(tmp_path / "split" / "train", 2)
    (tmp_path / "split" / "train" / CLASSES[0]).rename(tmp_path / "split" / "train" / "test")
    with pytest.raises(InputError, match="named like a split"):
        read_dataset(tmp_path / "split")


def test_splits_without_class_folders_are_refused(tmp_path):
    for split in ("train", "test"):
        put_image(tmp_path / split / "0.png")
    with pytest.raises(InputError, match=r"the splits test/, train/, but no class folders"):
        read_dataset(tmp_path)


def test_two_folders_of_one_split_are_refused(tmp_path):
    for split in ("train", "val", "validation"):
        make_folders(tmp_path / split, 1)
    with pytest.raises(InputError, match=r"two folders for the val split.*merge"):
        read_dataset(tmp_path)


def test_folders_without_images_beside_splits_are_left_out(tmp_path):
    for split in ("train", "val"):
        make_folders(tmp_path / split, 1)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "readme.md").write_text("")
    dataset = read_dataset(tmp_path)
    assert dataset.classes == CLASSES
    assert "1 folder without images" in dataset.left_out[0]


def test_one_level_too_high_is_refused_with_the_folder_to_give(tmp_path):
    for site in ("site1", "site2"):
        make_folders(tmp_path / "sites" / site, 1)
    with pytest.raises(InputError, match=r"one level too high.*crossed, lying.*Give one.*site1"):
        read_dataset(tmp_path / "sites")
    make_folders(tmp_path / "single" / "images", 1)
    with pytest.raises(InputError, match=r"one level too high: give .*single.images"):
        read_dataset(tmp_path / "single")
    for split in ("train", "test"):
        make_folders(tmp_path / "double" / "chest" / split, 1)
    (tmp_path / "double" / "notes").mkdir()
    with pytest.raises(InputError, match=r"one level too high: give .*double.chest"):
        read_dataset(tmp_path / "double")


def test_images_below_class_folders_are_refused(tmp_path):
    make_folders(tmp_path, 2)
    put_image(tmp_path / CLASSES[0] / "patient7" / "0.png")
    with pytest.raises(InputError, match=r"crossed holds images in folders below it \(patient7\)"):
        read_dataset(tmp_path)


def test_folders_without_images_below_class_folders_are_no_matter(tmp_path):
    make_folders(tmp_path, 2)
    (tmp_path / CLASSES[0] / "masks").mkdir()
    (tmp_path / CLASSES[0] / "masks" / "0.npy").write_bytes(b"")
    dataset = read_dataset(tmp_path)
    assert len(dataset.samples) == 6
    assert "1 .npy file" in dataset.left_out[0]


def test_hidden_and_system_folders_are_left_out_at_every_level(tmp_path):
    root = make_folders(tmp_path / "data", 3)
    copies = (".ipynb_checkpoints", "@eaDir/000.png", "__MACOSX", "__MACOSX/a")
    for where in (root, root / CLASSES[0]):
        for name in copies:
            put_image(where / name / "copy.png")
    (root / CLASSES[1] / "._00.png").write_bytes(b"x")
    dataset = read_dataset(root)
    assert dataset.classes == CLASSES
    assert len(dataset.samples) == 9
    assert "3 hidden" in dataset.left_out[0] and "4 folders of a system" in dataset.left_out[0]


def test_what_is_no_image_is_said_by_kind(tmp_path):
    root = make_folders(tmp_path / "data", 2)
    for name in ("a.pdf", "a.h5", "a.mpg", "a.emf", "a.dcm", "b.dcm", "a.eps"):
        (root / CLASSES[0] / name).write_bytes(b"%PDF-1.4")
    put_image(root / "loose.png")
    dataset = read_dataset(root)
    assert len(dataset.samples) == 6
    (line,) = dataset.left_out
    for part in ("2 .dcm files", "1 .pdf", "1 .h5", "1 .mpg", "1 .emf", "1 .eps"):
        assert part in line
    assert "1 image outside class folders" in line
    for path in (root / CLASSES[1]).iterdir():
        path.rename(path.with_suffix(".dcm"))
    with pytest.raises(InputError, match=r"lying holds no images.*2 \.dcm files"):
        read_dataset(root)


RUNS = ("run", "runs/1", "b", "unfinished")


def test_runs_inside_the_data_are_left_out(tmp_path):
    root = make_folders(tmp_path / "data", 2)
    for run, file in (("run", "config.json"), ("runs/1", "config.json"), ("b", "manifest.json")):
        put_image(root / run / "curves.png")
        kind = "bundle" if file == "manifest.json" else "adapter"
        (root / run / file).write_text(f'{{"format": "fastadapt-{kind}"}}')
    put_image(root / "unfinished" / "curves.png")
    for name in ("state.safetensors", "metrics.jsonl"):
        (root / "unfinished" / name).write_bytes(b"")
    dataset = read_dataset(root)
    assert dataset.classes == CLASSES and len(dataset.samples) == 6
    lines = {f"left out: {root / name}, a folder that fastadapt wrote" for name in RUNS}
    assert set(dataset.left_out) == lines
    with pytest.raises(InputError, match="is a run or a bundle"):
        read_dataset(root / "run")
    for name in CLASSES:
        shutil.rmtree(root / name)
    with pytest.raises(InputError, match="holds no images"):
        read_dataset(root)


def test_a_config_of_another_program_makes_no_run(tmp_path):
    root = make_folders(tmp_path / "data", 2)
    (root / CLASSES[0] / "config.json").write_text('{"format": "coco"}')
    (root / CLASSES[1] / "config.json").write_text("[" * 100_000)
    assert read_dataset(root).classes == CLASSES


def test_links_to_folders_are_followed(tmp_path):
    elsewhere = make_folders(tmp_path / "elsewhere", 2)
    root = tmp_path / "data"
    root.mkdir()
    for name in CLASSES[:2]:
        (root / name).symlink_to(elsewhere / name)
    (root / CLASSES[2]).mkdir()
    for path in (elsewhere / CLASSES[2]).iterdir():
        (root / CLASSES[2] / path.name).symlink_to(path)
    (root / CLASSES[2] / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / CLASSES[2] / "circle").symlink_to(root)
    dataset = read_dataset(root)
    assert dataset.classes == CLASSES and len(dataset.samples) == 6
    assert "1 link that leads nowhere" in dataset.left_out[0]
    assert "1 link that leads back" in dataset.left_out[0]


def test_classes_that_look_alike_are_warned_of(tmp_path):
    for name in ("Caf\u00e9", "Cafe\u0301", "dog", "DOG", "cat"):
        for index in range(2):
            put_image(tmp_path / name / f"{index}.png")
    lines = read_dataset(tmp_path).summary()
    assert lines[0] == "images by class: " + ", ".join(
        f"{name} 2" for name in ("Cafe\u0301", "Caf\u00e9", "DOG", "cat", "dog")
    )
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 2
    assert "'DOG', 'dog'" in warnings[1]


def test_a_class_name_of_two_lines_is_refused(tmp_path):
    make_folders(tmp_path, 2)
    (tmp_path / CLASSES[0]).rename(tmp_path / "a\nb")
    with pytest.raises(InputError, match="more than one line"):
        read_dataset(tmp_path)


SYSTEM = {".hidden", "__MACOSX", "@eaDir"}
NAMES = ("cat", "dog", "bird", "Cat", ".hidden", "__MACOSX", "@eaDir", "x y")
FILES = ("0.png", "1.JPG", "2.tif", ".3.png", "4.dcm", "5.pdf", "6", "7.eps", "8.webp")
IMAGES = {"0.png", "1.JPG", "2.tif", "8.webp"}


@settings(max_examples=30, deadline=None)
@given(
    tree=st.dictionaries(
        st.sampled_from(NAMES), st.sets(st.sampled_from(FILES), min_size=1), min_size=1
    ),
    splits=st.sampled_from([(), ("train", "Validation"), ("TRAINING", "test", "val")]),
)
def test_every_file_is_a_sample_or_accounted_for(tmp_path_factory, tree, splits):
    root = tmp_path_factory.mktemp("tree")
    for split in splits or ("",):
        for name, files in tree.items():
            (root / split / name).mkdir(parents=True)
            for file in files:
                (root / split / name / file).write_bytes(b"")
    visible = {name: files & IMAGES for name, files in tree.items() if name not in SYSTEM}
    expected = {
        root / split / name / file
        for split in splits or ("",)
        for name, files in visible.items()
        for file in files
    }
    try:
        dataset = read_dataset(root)
    except InputError as error:
        filled = [files for files in visible.values() if files]
        single = "val" not in str(splits).lower() and any(len(files) < 2 for files in filled)
        assert len(filled) < 2 or single or (len(filled) < len(visible) and not splits), error
        return
    assert {sample.path for sample in dataset.samples} == expected
    for sample in dataset.samples:
        assert dataset.classes[sample.label] == sample.path.parent.name
        if splits:
            assert sample.path.parent.parent.name[:2].lower() == sample.split[:2]
