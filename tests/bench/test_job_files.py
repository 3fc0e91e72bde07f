"""Files that whole jobs start from."""

import csv
import importlib.util
from collections import Counter

import pytest
import timm
from PIL import Image

from fastadapt.bench import job_files
from fastadapt.files import read_tensors


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_images_are_generated_where_no_data_set_is_installed(tmp_path, no_packages):
    path, kind = job_files.write_data(tmp_path, 40)
    rows = rows_of(path)
    assert kind == "40 images, generated JPEGs, 300 × 300"
    assert Counter(row["label"] for row in rows) == dict.fromkeys(job_files.CLASSES, 20)
    counts = Counter(row["split"] for row in rows)
    assert counts["train"] == 26 and counts["val"] >= 4 and counts["test"] == 10
    for row in rows:
        with Image.open(row["path"]) as image:
            assert image.format == "JPEG" and image.size == (300, 300)


def test_a_part_of_the_solar_cells_is_split_as_the_whole(tmp_path):
    pytest.importorskip("elpv_dataset")
    _, kind = job_files.write_data(tmp_path, 2624)
    assert kind == "2624 images, elpv-dataset's PNGs, 300 × 300"
    whole = Counter(row["split"] for row in rows_of(tmp_path / "data.csv"))
    assert all(abs(whole[split] - count) <= 1 for split, count in job_files.SHARES.items())
    job_files.write_data(tmp_path, 100)
    part = rows_of(tmp_path / "data.csv")
    assert 99 <= len(part) <= 101
    assert {row["split"] for row in part} == set(job_files.SHARES)
    assert len({row["path"] for row in part}) == len(part)


def test_weights_fit_a_backbone_without_a_head(tmp_path, no_packages):
    job_files.write_backbone(tmp_path / "w.safetensors", "test_efficientnet")
    tensors, _ = read_tensors(tmp_path / "w.safetensors")
    timm.create_model("test_efficientnet", num_classes=0).load_state_dict(tensors)
