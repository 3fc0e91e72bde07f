import csv
import json
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastadapt as fa
from fastadapt.data.dataset import read_unsplit
from fastadapt.data.images import ImageSource
from fastadapt.data.preprocess import Preprocess
from fastadapt.data.scan import scan
from fastadapt.errors import InputError
from fastadapt.progress import progress_bars
from fastadapt.train import FoldSettings, TrainConfig, folds_table, train_folds
from fastadapt.train.fold_plan import parts_of
from fastadapt.train.fold_settings import parse_seeds
from fastadapt.train.shared_sources import SharedSources
from fastadapt.train.sources import FeatureSource
from fastadapt.train.start import start_from
from fastadapt.written_folders import is_ours
from tests.helpers.imagesets import CLASSES, make_folders, write_csv

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=0.5, input_size=(3, 32, 32))
QUICK = TrainConfig(epochs=2, lr=3e-3, batch_size=8)


def run(data, out, folds, config=QUICK, adapt=ADAPT, **options):
    options = {"pretrained": False, "workers": 1, "save_every": 0, **options}
    return train_folds(data, out, "test_vit", config, adapt, folds, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folds of 18 images of two classes, in six groups of three images each, and their table."""
    folder = tmp_path_factory.mktemp("folds")
    root = make_folders(folder / "data", 9, CLASSES[:2])
    paths = sorted(root.rglob("*.png"))
    rows = [(p, p.parent.name, f"slide {i % 6}") for i, p in enumerate(paths)]
    write_csv(folder / "data.csv", rows, ("path", "label", "group"))
    torch.manual_seed(0)
    return folder, run(folder / "data.csv", folder / "out", FoldSettings(folds=3))


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_is_held_out_once_with_its_group(made):
    folder, result = made
    rows = read_csv(folder / "out" / "splits.csv")
    assert list(rows[0]) == ["path", "label", "group", "fold"]
    folds = {row["path"]: row["fold"] for row in rows}
    for group in {row["group"] for row in rows}:
        assert len({row["fold"] for row in rows if row["group"] == group}) == 1
    held_out = []
    for number, path in enumerate(result.runs, start=1):
        splits = {row["path"]: row["split"] for row in read_csv(path / "splits.csv")}
        tests = [name for name, split in splits.items() if split == "test"]
        assert tests and all(folds[name] == str(number) for name in tests)
        held_out += tests
    assert sorted(held_out) == sorted(folds)


def test_results_are_means_over_runs_and_pooled_predictions(made):
    _, result = made
    summary = json.loads((result.out / "folds.json").read_text())
    assert summary == json.loads(json.dumps(result.summary)) and summary["finished"]
    scores = [json.loads((path / "results.json").read_text()) for path in result.runs]
    accuracies = [found["test"]["accuracy"] for found in scores]
    mean = summary["mean"]["model"]["accuracy"]
    assert mean == {"mean": np.mean(accuracies), "std": np.std(accuracies, ddof=1), "runs": 3}
    probes = [found["linear_probe"]["test"]["accuracy"] for found in scores]
    difference = summary["mean"]["difference"]["accuracy"]["mean"]
    assert difference == pytest.approx(np.mean(np.subtract(accuracies, probes)))
    right = sum(a * found["test"]["images"] for a, found in zip(accuracies, scores, strict=True))
    assert summary["pooled"]["images"] == 18 and summary["pooled"]["clusters"] == "groups"
    assert summary["pooled"]["accuracy"] == pytest.approx(right / 18)
    low, high = summary["pooled"]["intervals"]["accuracy"]
    assert low <= summary["pooled"]["accuracy"] <= high
    table = read_csv(result.out / "folds.csv")
    assert [row["folder"] for row in table] == ["fold-1", "fold-2", "fold-3", "mean", "std"]
    assert float(table[3]["accuracy"]) == pytest.approx(np.mean(accuracies), abs=1e-5)
    names = list(folds_table(result).columns[0].cells)
    assert names == ["model", "linear probe", "difference", "95 % interval"]
    assert is_ours(result.out)


def test_runs_beside_each_other_give_the_same(made, tmp_path):
    folder, one = made
    folds = FoldSettings(folds=3, devices="cpu,cpu")
    both = run(folder / "data.csv", tmp_path / "out", folds)
    assert [path.name for path in both.runs] == [path.name for path in one.runs]
    for mine, theirs in zip(both.runs, one.runs, strict=True):
        a, b = (load_file(path / "adapter.safetensors") for path in (mine, theirs))
        for name, value in a.items():  # the processes may have other numbers of threads
            torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-3, msg=name)
    assert both.summary["finished"]
    assert (both.out / "splits.csv").read_text() == (one.out / "splits.csv").read_text()
    assert len(list((both.out / "cache").glob("*.npy"))) == 1
    with pytest.raises(InputError, match="goes with `folds` and `seeds`"):
        FoldSettings(devices="all")


def test_unfinished_runs_go_on_and_finished_ones_stay(made, tmp_path, monkeypatch):
    folder, result = made
    out = shutil.copytree(result.out, tmp_path / "out")
    shutil.rmtree(out / "fold-2")
    (out / "fold-3" / "results.json").unlink()
    before = (out / "fold-1" / "predictions.csv").stat().st_mtime_ns
    again = run(folder / "data.csv", out, FoldSettings(folds=3), resume=True)
    assert (out / "fold-1" / "predictions.csv").stat().st_mtime_ns == before
    for one, other in zip(result.runs, again.runs, strict=True):
        assert (one / "predictions.csv").read_text() == (other / "predictions.csv").read_text()
    assert again.summary == result.summary
    with pytest.raises(InputError, match=r"holds several runs: name one of them, .*/fold-1, as"):
        start_from(out, None, CLASSES[:2], None)
    for options, message in (
        ({}, "holds folds already"),
        ({"resume": True, "folds": FoldSettings(folds=4)}, "folds is 4, but was 3"),
        ({"resume": True, "config": TrainConfig(epochs=3, batch_size=8)}, "epochs is 3, but was 2"),
    ):
        with pytest.raises(InputError, match=message):
            run(folder / "data.csv", out, **{"folds": FoldSettings(folds=3), **options})


def test_seeds_train_on_the_same_given_splits(tmp_path):
    for split in ("train", "val", "test"):
        make_folders(tmp_path / "data" / split, 4, CLASSES[:2])
    config = TrainConfig(epochs=1, lr=3e-3, batch_size=8, cache=False, stages=2, epochs2=1)
    result = run(tmp_path / "data", tmp_path / "out", FoldSettings(seeds=(3, 7)), config)
    assert [path.name for path in result.runs] == ["seed-3", "seed-7"]
    assert result.summary["held_out"] == "test" and result.summary["pooled"]["images"] == 16
    one, other = (read_csv(path / "predictions.csv") for path in result.runs)
    assert [row["path"] for row in one] == [row["path"] for row in other]
    assert one != other
    for path in result.runs:
        assert fa.load_adapter(path).backbone_trained


HEADER = ("path", "label", "group", "fold")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda i: ("g", ""), {}, "all 12 images are of one group, 'g'"),
        (lambda i: (f"g{i % 2}", ""), {}, "class 'crossed' has 2 groups with images of it"),
        (lambda i: (str(i), f"f{i % 2}"), {}, "folds is 3, but the column 'fold' has 2: f0, f1"),
        (lambda i: (str(i), f"f{i // 4}"), {}, "fold f0 has no image of class 'lying'"),
        (lambda i: (str(i), "f1" if i else ""), {}, "column 'fold' has no value in 1 of 12 rows"),
        (lambda i: (str(i), f"f{i % 3}"), {"val_fold": "f1"}, "leave out `val_fold`"),
    ],
)
def test_what_cannot_be_folded_gets_one_line(tmp_path, change, options, message):
    root = make_folders(tmp_path / "data", 6, CLASSES[:2])
    paths = sorted(root.rglob("*.png"))
    rows = [(p, p.parent.name, *change(i)) for i, p in enumerate(paths)]
    if "" in {row[3] for row in rows} and len({row[3] for row in rows}) == 1:
        rows = [row[:3] for row in rows]
    file = write_csv(tmp_path / "data.csv", rows, HEADER)
    config = TrainConfig(epochs=1, **options)
    with pytest.raises(InputError, match=message) as error:
        run(file, tmp_path / "out", FoldSettings(folds=3), config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_nothing_is_computed_while_kernels_compile(tmp_path, monkeypatch):
    compiled = threading.Event()

    def begin(model, config, device, dtype, cached):
        assert isinstance(model, fa.AdaptedModel) and cached
        thread = threading.Timer(0.1, compiled.set)
        thread.start()
        return thread

    def stop(*given):
        raise InputError("compiled" if compiled.is_set() else "too early")

    module = sys.modules[train_folds.__module__]
    monkeypatch.setattr(module, "begin_kernels", begin)
    monkeypatch.setattr(module, "parts_of", stop)
    root = make_folders(tmp_path / "data", 6, CLASSES[:2])
    with pytest.raises(InputError, match="compiled"):
        run(root, tmp_path / "out", FoldSettings(folds=3))


def test_more_folds_than_images_and_given_splits_are_refused(tmp_path):
    root = make_folders(tmp_path / "data", 4, CLASSES[:2])
    with pytest.raises(InputError, match="class 'crossed' has 4 images, too few for 5 folds"):
        run(root, tmp_path / "out", FoldSettings(folds=5))
    make_folders(tmp_path / "splits" / "train", 2, CLASSES[:2])
    with pytest.raises(InputError, match=r"gives splits \(train\), and so does `folds`"):
        run(tmp_path / "splits", tmp_path / "out", FoldSettings(folds=5))
    with pytest.raises(InputError, match="folds is 2; expected 3 to 1,000"):
        FoldSettings(folds=2)


def test_copies_of_an_image_are_kept_in_one_fold(tmp_path, capsys):
    root = make_folders(tmp_path / "data", 6, CLASSES[:2])
    for index in range(4):
        shutil.copy(root / "lying" / "00.png", root / "lying" / f"copy{index}.png")
    with progress_bars() as progress:
        found = scan(read_unsplit(root), 1)
        numbers, parts = parts_of(found, FoldSettings(folds=3), 0, progress)
    assert "4 images are there twice, by their bytes" in capsys.readouterr().err
    same = [
        number
        for number, sample in zip(numbers, found.dataset.samples, strict=True)
        if "copy" in sample.path.name or sample.path.match("lying/00.png")
    ]
    assert len(same) == 5 and len(set(same)) == 1 and len(parts) == 3


def test_folds_of_a_column_are_taken_and_what_they_tear_is_said(tmp_path, capsys):
    root = make_folders(tmp_path / "data", 6, CLASSES[:2])
    shutil.copy(root / "lying" / "00.png", root / "lying" / "01.png")
    paths = sorted(root.rglob("*.png"))
    rows = [(p, p.parent.name, f"g{i // 2}", f"{i % 3 + 8}") for i, p in enumerate(paths)]
    file = write_csv(tmp_path / "data.csv", rows, HEADER)
    with progress_bars() as progress:
        found = scan(read_unsplit(file), 1)
        numbers, parts = parts_of(found, FoldSettings(folds=3), 0, progress)
    said = " ".join(capsys.readouterr().err.split())
    assert "6 of 6 groups have images in several folds (first 'g0')" in said
    assert "2 images have the same bytes as one of another fold" in said
    assert numbers == [1, 2, 3] * 4
    assert {s.fold for s in parts[2].split("test")} == {"10"}


def test_seeds_are_a_count_or_a_list():
    assert parse_seeds("3") == (0, 1, 2) and parse_seeds("3,") == (3,)
    assert parse_seeds("1, 2,9") == (1, 2, 9) and parse_seeds("") == ()
    refused = {"a": "expected a count", "0": "seeds is 0", "-1,2": "expected a"}
    refused |= dict.fromkeys((",", ",,", "1,,2", ",1"), "expected a count, or numbers")
    for text, message in refused.items():
        with pytest.raises(InputError, match=message):
            parse_seeds(text)
    with pytest.raises(InputError, match="seeds is 1,1; expected different numbers"):
        FoldSettings(seeds=(1, 1))


def test_subsets_give_the_rows_of_the_whole(tmp_path):
    samples = read_unsplit(make_folders(tmp_path / "data", 4, CLASSES[:2])).samples
    cpu = torch.device("cpu")
    images = ImageSource(samples, Preprocess((3, 32, 32)), cpu, 1, "flips", 5)
    tokens = torch.randn(2, 8, 3, 5)
    shared = SharedSources(images, FeatureSource(tokens, images.labels, cpu))
    chosen = [samples[6], samples[1], samples[3]]
    views, order = np.ones(3, np.int64), np.array([2, 0, 1])

    features = shared.features_of(chosen)
    x, y = next(features.batches(order, views, 3))
    assert torch.equal(x, tokens[1, [3, 6, 1]]) and y.tolist() == [0, 1, 0]
    assert torch.equal(torch.from_numpy(features.pooled), tokens[0, [6, 1, 3]].mean(1))

    mine = shared.images_of(chosen, "flips", 5)
    x, y = next(mine.batches(order, views, 3))
    whole, _ = next(images.batches(np.array([3, 6, 1]), np.ones(8, np.int64), 3))
    assert torch.equal(x, whole) and y.tolist() == [0, 1, 0]
    assert mine.labels.tolist() == [1, 0, 0] and len(mine.samples) == 3
