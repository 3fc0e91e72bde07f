"""The commands predict and embed, from image files to results, with real models."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import load
from fastadapt.files import read_json, write_json
from tests.helpers.command import command
from tests.helpers.imagesets import CLASSES
from tests.helpers.shallow_models import SHALLOW_VIT


def read(file):
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.parametrize("name", ["uint8", "float", "resize"])
def test_bundles(tuned_bundles, name, tmp_path, monkeypatch, capsys):
    folder, out = tuned_bundles[0], tmp_path / "out.csv"
    pictures = shutil.copytree(folder / "pictures", tmp_path / "pictures")
    paths = sorted(pictures.iterdir())
    (pictures / "bad.png").write_text("no image")
    args = ("predict", folder / name, pictures, "--out", out, "--batch", 5, "--logits")
    assert command(monkeypatch, *args) == 3
    said = capsys.readouterr()
    assert f"1 of {len(paths) + 1} files cannot be read: {out}.unreadable.csv" in said.err
    assert f"{len(paths)} images" in said.out
    rows, want = read(out), load(folder / name)(paths)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [row["prediction"] for row in rows] == want.labels
    for kind in ("logits", "probabilities"):
        found = [[float(row[f"{kind}_{name}"]) for name in CLASSES] for row in rows]
        np.testing.assert_allclose(found, getattr(want, kind), atol=1e-4)
    (bad,) = read(tmp_path / "out.csv.unreadable.csv")
    assert bad["path"] == str(pictures / "bad.png") and "cannot be read" in bad["reason"]
    assert command(monkeypatch, *args) == 1
    assert "is there, and complete: replace it with --overwrite" in capsys.readouterr().err
    parts = tmp_path / "out.csv.parts"  # of a command that was killed while it removed them
    parts.mkdir()
    (parts / "part-000001.json").write_text("{}")
    ours, theirs = tmp_path / ".out.csv.a1b2c3d4.tmp", tmp_path / ".notes.csv.a1b2c3d4.tmp"
    ours.touch(), theirs.touch()
    assert command(monkeypatch, *args, "--resume") == 3
    assert "is there, and complete: there is nothing to resume" in capsys.readouterr().err
    assert not parts.exists() and not ours.exists() and theirs.exists()
    assert command(monkeypatch, *args, "--overwrite") == 3


def test_a_run_and_its_bundle_agree_and_are_evaluated(made, tmp_path, monkeypatch, capsys):
    tables = {}
    for name in ("run", "bundle"):
        out = tmp_path / f"{name}.jsonl"
        args = ("predict", made / name, made / "images", "--out", out, "--labels", "folders")
        assert command(monkeypatch, *args) == 0
        said = capsys.readouterr().out
        assert "accuracy" in said and "(24 labelled images)" in said
        tables[name] = [json.loads(line) for line in out.read_text().splitlines()]
    right = sum(row["prediction"] == row["target"] for row in tables["run"])
    assert f"accuracy {right / 24:.2%}, balanced accuracy {right / 24:.2%}" in said
    for one, other in zip(tables["run"], tables["bundle"], strict=True):
        assert one["path"] == other["path"] and one["prediction"] == other["prediction"]
        for kind in ("crack", "good"):
            assert abs(one["probabilities"][kind] - other["probabilities"][kind]) < 1e-4


def test_labels_from_a_column(made, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.csv"
    args = ("predict", made / "bundle", made / "run" / "splits.csv", "--out", out)
    assert command(monkeypatch, *args, "--labels", "label", "--top-k", 1) == 0
    assert "(24 labelled images)" in capsys.readouterr().out
    assert all(row["top_classes_1"] == row["prediction"] for row in read(out))


def test_features_of_a_run(made, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    assert command(monkeypatch, "embed", made / "run", made / "images", "--out", out) == 0
    rows = read(out)
    model = fa.load_adapter(made / "run")
    preprocess = Preprocess.from_dict(read_json(made / "run" / "config.json")["preprocess"])
    pixels = torch.stack([preprocess.read(row["path"]) for row in rows])
    with torch.no_grad():
        images = preprocess.normalize(pixels)
        want = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = model.head(want)
    found = [[float(row[f"features_{i}"]) for i in range(want.shape[1])] for row in rows]
    np.testing.assert_allclose(found, want.numpy(), atol=1e-4)
    assert logits.std() > 0


def test_features_of_a_backbone(made, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    weights = ("--weights", made / "weights.pth", "--image-size", 32)
    args = ("embed", SHALLOW_VIT, made / "images" / "good", "--out", out, *weights)
    assert command(monkeypatch, *args) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12 and {len(row["features"]) for row in rows} == {64}
    # A folder of that name wins.
    shutil.copytree(made / "run", tmp_path / SHALLOW_VIT)
    monkeypatch.chdir(tmp_path)
    args = ("embed", SHALLOW_VIT, made / "images" / "good", "--out", "run.jsonl")
    assert command(monkeypatch, *args) == 0
    assert (tmp_path / "run.jsonl").read_text() != out.read_text()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("predict", "gone", "images", "--out", "o.csv"), "gone does not exist; expected a bundle"),
        (("predict", "images", "images", "--out", "o.csv"), "images is neither a bundle"),
        (("predict", "bundle", "gone", "--out", "o.csv"), "gone does not exist"),
        (("predict", "bundle", "images", "--out", "o.txt"), "has the ending '.txt'; expected .csv"),
        (("predict", "bundle", "images", "--out", "images"), "has the ending ''"),
        (("predict", "bundle", "-", "-", "--out", "o.csv"), "name it once"),
        (("predict", "bundle", "images", "--out", "o.csv", "--batch", 0), "--batch is 0"),
        (
            ("predict", "bundle", "images", "--out", "o.csv", "--resume", "--overwrite"),
            "--resume keeps what is there and --overwrite does not",
        ),
        (("predict", "bundle", "images", "--out", "o.csv", "--labels", "x"), "is no table"),
        (("embed", "bundle", "images", "--out", "o.csv", "--weights", "w"), "leave out --weights"),
        (("predict", "bundle", "images", "--out", "bundle/o.csv"), "o.csv is in the bundle"),
        (("predict", "run", "images", "--out", "o.csv", "--device", "tpu"), "device is 'tpu'"),
        (("embed", "bundle", "images", "--out", "o.csv"), "has no output of features, only its"),
        (
            ("predict", "bundle", "images", "--out", "o.csv", "--embeddings"),
            "export it with --with-features",
        ),
        (("embed", "vit_gone", "images", "--out", "o.csv"), "no folder vit_gone, and timm has no"),
    ],
)
def test_what_does_not_fit(made, tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(made)
    args = [str(tmp_path / arg) if str(arg).startswith("o.") else arg for arg in args]
    assert command(monkeypatch, *args) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said.replace("`", "")
    assert list(tmp_path.iterdir()) == []


def test_parquet_without_pyarrow(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    args = ("predict", made / "bundle", made / "images", "--out", tmp_path / "o.parquet")
    assert command(monkeypatch, *args) == 1
    assert "Parquet files need pyarrow: pip install pyarrow" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(made, tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastadapt.export.predict.part_maker.compute", stop)
    args = ("predict", made / "bundle", made / "images", "--out", tmp_path / "o.csv")
    assert command(monkeypatch, *args) == 130
    said = capsys.readouterr().err
    assert "finished parts are kept. Continue: fastadapt predict" in said and "--resume" in said
    monkeypatch.undo()
    assert command(monkeypatch, *args, "--resume") == 0
    assert len(read(tmp_path / "o.csv")) == 24


def test_a_wrong_label_costs_no_work(made, tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.csv"
    rows = [f"{made}/images/{name}/{n}.png,{name}" for n, name in enumerate(("crack", "good"))]
    table.write_text("\n".join(["path,label", *rows, f"{made}/images/good/3.png,god"]))
    args = ("predict", made / "bundle", table, "--out", tmp_path / "o.csv", "--labels", "label")
    assert command(monkeypatch, *args) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1 of 3 labels is no class of the model, 'god' of" in said
    assert list(tmp_path.iterdir()) == [table]


def test_own_files_are_not_worth_a_word(made, tmp_path, monkeypatch, capsys):
    images = shutil.copytree(made / "images", tmp_path / "images")
    (images / "bad.png").write_text("no image")
    (images / ".hidden.png").touch()
    monkeypatch.chdir(images)
    args = ("predict", made / "bundle", ".", "--out", images / "o.csv", "--batch", 8)
    for more in ((), ("--resume",), ("--overwrite",)):
        assert command(monkeypatch, *args, *more) == 3
        said = capsys.readouterr().err
        if more != ("--resume",):
            assert "left out: 1 hidden (.hidden.png)\n" in said
    (images / "other.csv").touch()
    (images / "o.csv.parts").mkdir()  # of a command that was killed at once
    write_json(images / "o.csv.parts" / "manifest.json", {"format": "fastadapt-parts"})
    assert command(monkeypatch, *args, "--overwrite") == 3
    assert "left out: 1 hidden (.hidden.png); 1 .csv file (other.csv)\n" in capsys.readouterr().err


def test_a_table_of_images_is_not_replaced_by_its_results(made, tmp_path, monkeypatch, capsys):
    table = tmp_path / "x.csv"
    rows = f"path,label\n{made}/images/good/1.png,\n"
    monkeypatch.chdir(tmp_path)
    for name in ("x.csv", "y.csv.unreadable.csv"):
        (tmp_path / name).write_text(rows)
        args = ("predict", made / "bundle", name, "--out", tmp_path / f"{name[0]}.csv")
        assert command(monkeypatch, *args, "--overwrite") == 1
        said = capsys.readouterr().err
        assert f"{name} lists the images, and would be replaced by the results" in said
        assert (tmp_path / name).read_text() == rows
    args = ("predict", made / "bundle", table, "--out", tmp_path / "o.csv", "--labels", "label")
    assert command(monkeypatch, *args) == 0
    assert "no image that can be read has a label" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bundle", "resize"])
def test_pages_that_are_not_read_are_told(made, tuned_bundles, tmp_path, monkeypatch, capsys, name):
    bundle = made / "bundle" if name == "bundle" else tuned_bundles[0] / "resize"
    folder = tmp_path / "images"
    folder.mkdir()
    pages = [Image.new("RGB", (40, 40), (level, 0, 0)) for level in (0, 200)]
    pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "b.gif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "c.tif", save_all=True, append_images=pages[1:])
    assert command(monkeypatch, "predict", bundle, folder, "--out", tmp_path / "o.csv") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"warning: 2 of 3 images lose pages after the first (first {folder}/a.tif)",
        f"warning: 1 of 3 images loses frames after the first (first {folder}/b.gif)",
    ]


def test_a_run_that_is_unfinished_is_named_so(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    args = ("predict", tmp_path / "run", made / "images", "--out", tmp_path / "o.csv")
    assert command(monkeypatch, *args) == 1
    assert "run holds an unfinished run: resume its training first" in capsys.readouterr().err
