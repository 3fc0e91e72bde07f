"""Rows in a file: the same whatever stopped the command before, and in little memory."""

import csv
import errno
import itertools
import json
import os
import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest

import fastadapt as fa
from fastadapt.export.predict import part_maker
from fastadapt.export.predict.columns import FeatureColumns, PredictionColumns
from fastadapt.export.predict.decode_ahead import DecodedBatch
from fastadapt.export.predict.job import Job
from fastadapt.export.predict.models import ImageModel
from fastadapt.export.predict.parts import Parts
from fastadapt.export.predict.settings import WorkSettings
from fastadapt.export.predict.sources import ImageList, Item
from fastadapt.files import read_json

CLASSES = ("crack", "good", "crack")


class Stop(Exception):
    pass


class Paths(ImageList):
    """Generated paths, whose labels alternate."""

    def __init__(self, count, start=0):
        super().__init__(("generated",))
        self.numbers = range(start, start + count)

    def count(self):
        return len(self.numbers)

    def __iter__(self):
        return (Item(f"{n:07}.png", CLASSES[n % 2]) for n in self.numbers)


def stub_decoder(reading, value_range, batch, workers):
    """Pixels that are a path's number; every 50th file cannot be read."""

    def decode(batches):
        for paths in batches:
            numbers = np.array([int(path[:7]) for path in paths], np.int64)
            bad = {i: f"{paths[i]} is bad" for i in np.flatnonzero(numbers % 50 == 49).tolist()}
            rows = [i for i in range(len(paths)) if i not in bad]
            yield DecodedBatch([(rows, numbers[rows].reshape(-1, 1, 1, 1))], bad)

    return nullcontext(decode)


def stub_model(stop_at=None, width=3, classes=CLASSES):
    calls = itertools.count(1)

    def run(pixels):
        if next(calls) == stop_at:
            raise Stop
        numbers = pixels.reshape(-1, 1)
        return np.sin(numbers * np.arange(1, width + 1)).astype(np.float32)

    return ImageModel(run, width, classes, None, None, "a stub", {"hash": "1"})


def make_job(out, count=2300, stop_at=None, *, features=False, start=0, **work):
    width, classes = (5, ()) if features else (3, CLASSES)
    model = stub_model(stop_at, width, classes)
    columns = FeatureColumns(model) if features else PredictionColumns(model, True, 2, True)
    settings = WorkSettings(images=("x",), out=out, quiet=True, **work)
    return Job(model, Paths(count, start), columns, settings, {}, stub_decoder)


ENDINGS = (".csv", ".jsonl", ".parquet")


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_bytes_after_a_stop_are_those_without_one(tmp_path, ending, features):
    whole = tmp_path / f"whole{ending}"
    summary = make_job(whole, features=features).run()
    assert (summary.images, summary.computed, summary.unreadable) == (2300, 2300, 46)
    for stop_at in (1, 2, 32, 33, 40, 64, 65, 72):
        out = tmp_path / f"stopped{stop_at}{ending}"
        with pytest.raises(Stop):
            make_job(out, stop_at=stop_at, features=features).run()
        assert not out.exists()
        again = make_job(out, features=features, resume=True).run()
        assert again.computed == 2300 - (stop_at - 1) // 32 * 1024
        assert out.read_bytes() == whole.read_bytes()
        assert again.unreadable_file.read_bytes() == summary.unreadable_file.read_bytes()
        assert again.metrics == summary.metrics
        assert sorted(p.name for p in tmp_path.glob(f"stopped{stop_at}*")) == [
            out.name,
            f"{out.name}.job.json",
            f"{out.name}.unreadable.csv",
        ]
        notes = [file.with_name(f"{file.name}.job.json") for file in (out, whole)]
        assert read_json(notes[0]) == read_json(notes[1])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("where", ["join", "remove"])
def test_a_stop_while_parts_are_joined(tmp_path, ending, where, monkeypatch):
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    make_job(whole).run()
    job = make_job(out)

    def stop(*args):
        if where == "join" or out.exists():
            raise Stop

    monkeypatch.setattr(job.rows if where == "join" else job.parts, where, stop)
    with pytest.raises(Stop):
        job.run()
    monkeypatch.undo()
    summary = make_job(out, resume=True).run()
    assert (summary.images, summary.computed) == (2300, 0)
    assert out.read_bytes() == whole.read_bytes()


def test_a_folder_that_was_removed_by_halves_is_no_part(tmp_path):
    out = tmp_path / "out.csv"
    make_job(out, count=10).run()
    (tmp_path / "out.csv.parts").mkdir()
    (tmp_path / "out.csv.parts" / "part-000001.csv").write_text("")
    with pytest.raises(fa.InputError, match="is there, and complete"):
        make_job(out, resume=True).run()
    assert not (tmp_path / "out.csv.parts").exists()


def rows_of(out):
    if out.suffix == ".csv":
        with out.open(newline="") as file:
            return list(csv.DictReader(file))
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()]
    import pyarrow.parquet

    return pyarrow.parquet.read_table(out).to_pylist()


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows(tmp_path, ending):
    out = tmp_path / f"out{ending}"
    make_job(out, count=60, batch=7).run()
    rows = rows_of(out)
    numbers = [n for n in range(60) if n != 49]
    assert [row["path"] for row in rows] == [f"{n:07}.png" for n in numbers]
    assert [row["target"] for row in rows] == [CLASSES[n % 2] for n in numbers]
    for number, row in zip(numbers, rows, strict=True):
        logits = np.sin(number * np.arange(1, 4))
        probabilities = np.exp(logits) / np.exp(logits).sum()
        names = ("crack", "good", "crack (2)")
        order = np.argsort(-logits, kind="stable")
        assert row["prediction"] == CLASSES[logits.argmax()]
        if ending == ".csv":
            found = [float(row[f"probabilities_{name}"]) for name in names]
            raw = [float(row[f"logits_{name}"]) for name in names]
            top = [row["top_classes_1"], row["top_classes_2"]]
            shares = [float(row["top_probabilities_1"]), float(row["top_probabilities_2"])]
        else:
            found, raw = row["probabilities"], row["logits"]
            if ending == ".jsonl":
                assert tuple(found) == names == tuple(raw)
                found, raw = list(found.values()), list(raw.values())
            top, shares = row["top_classes"], row["top_probabilities"]
        np.testing.assert_allclose(found, probabilities, rtol=1e-5)
        np.testing.assert_allclose(raw, logits, rtol=1e-5, atol=1e-6)
        assert top == [CLASSES[i] for i in order[:2]]
        np.testing.assert_allclose(shares, probabilities[order[:2]], rtol=1e-5)
    with (tmp_path / f"out{ending}.unreadable.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "reason"],
            ["0000049.png", "0000049.png is bad"],
        ]


def test_numbers_that_are_none_and_names_that_are_no_text(tmp_path, monkeypatch):
    for ending in ENDINGS:
        job = make_job(tmp_path / f"out{ending}", count=1, features=True)
        name = os.fsdecode(b"caf\xe9.png")
        job.images = [Item(name)]
        job._open_decoder = lambda *args: nullcontext(
            lambda batches: (DecodedBatch([([0], np.full((1, 1, 1, 1), np.nan))]) for _ in batches)
        )
        monkeypatch.setattr(job, "images", _Listed(job.images))
        notes = job.run().notes
        assert notes[0].startswith("warning: 1 of 1 image loses numbers: outputs of the model are ")
        (row,) = rows_of(tmp_path / f"out{ending}")
        assert row["path"] == "caf\\udce9.png"
    assert json.loads((tmp_path / "out.jsonl").read_text())["features"] == [None] * 5


class _Listed(ImageList):
    def __init__(self, items):
        super().__init__(("x",))
        self.items = items

    def __iter__(self):
        return iter(self.items)


class TestWhatIsThere:
    def test_results_are_replaced_only_on_request(self, tmp_path):
        out = tmp_path / "out.csv"
        make_job(out, count=40).run()
        before = out.read_bytes()
        with pytest.raises(fa.InputError, match="is there, and complete"):
            make_job(out, count=60).run()
        with pytest.raises(Stop):
            make_job(out, count=60, stop_at=2, overwrite=True).run()
        assert out.read_bytes() == before
        with pytest.raises(fa.InputError, match="holds finished parts"):
            make_job(out, count=60).run()
        make_job(out, count=60, resume=True).run()
        assert len(rows_of(out)) == 59
        make_job(out, count=40, overwrite=True).run()
        assert out.read_bytes() == before
        assert not (tmp_path / "out.csv.unreadable.csv").exists()

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ({"batch": 31}, r"made with another batch \(32, now 31\)"),
            ({"start": 1}, r"images are not those of .* \(part 1\)"),
            ({"count": 1000}, r"images are not those of .* \(part 1\)"),
        ],
    )
    def test_other_settings_and_other_images_are_refused(self, tmp_path, more, says):
        out = tmp_path / "out.csv"
        with pytest.raises(Stop):
            make_job(out, stop_at=40).run()
        with pytest.raises(fa.InputError, match=says):
            make_job(out, resume=True, **more).run()
        assert make_job(out, resume=True).run().images == 2300

    def test_files_of_others_are_left_alone(self, tmp_path):
        folder = tmp_path / "out.csv.parts"
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        with pytest.raises(fa.InputError, match=r"holds thesis\.txt"):
            make_job(tmp_path / "out.csv", overwrite=True).run()
        assert (folder / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("out.csv.parts/my-part-list.txt", "mine"),
            ("out.csv.parts/.part-mine.tmp", "mine"),
            ("out.csv.parts/manifest.json", '{"name": "an extension"}'),
            ("out.csv.parts", "mine"),
            ("out.csv.unreadable.csv", "file;complaint\n"),
            ("out.csv.job.json", '{"job": "mine"}'),
        ],
    )
    def test_names_like_ours_are_no_proof(self, tmp_path, name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        for overwrite in (False, True):
            with pytest.raises(fa.InputError, match="give another `out`"):
                make_job(tmp_path / "out.csv", count=10, overwrite=overwrite).run()
        assert (tmp_path / name).read_text() == content

    def test_a_command_that_finished_no_part_is_in_nobodys_way(self, tmp_path):
        out = tmp_path / "out.csv"
        for batch in (32, 16):
            with pytest.raises(Stop):
                make_job(out, count=60, stop_at=1, batch=batch).run()
        assert make_job(out, count=60).run().images == 60

    def test_a_full_disk_is_told_with_what_is_kept(self, tmp_path, monkeypatch):
        def finish(parts, number, part, rows):
            if number == 1:
                raise OSError(errno.ENOSPC, "No space left on device", "part")
            real(parts, number, part, rows)

        out, real = tmp_path / "out.csv", Parts.finish
        monkeypatch.setattr(Parts, "finish", finish)
        with pytest.raises(fa.InputError, match="part: No space left on device; finished parts"):
            make_job(out).run()
        monkeypatch.undo()
        assert make_job(out, resume=True).run().computed == 2300 - 1024

    def test_no_images(self, tmp_path):
        out = tmp_path / "out.csv"
        out.write_text("before")
        with pytest.raises(fa.InputError, match="there are no images in x"):
            make_job(out, count=0, overwrite=True).run()
        assert out.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(part_maker, "PART", 256)
    peaks = []
    for count in (2_000, 100_000):
        job = make_job(tmp_path / f"{count}.csv", count=count, batch=64)
        tracemalloc.start()
        assert job.run().images == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**20
