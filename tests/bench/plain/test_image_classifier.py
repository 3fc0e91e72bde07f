"""The clock of the page of plain PyTorch; tests of end_to_end run the page itself."""

import json

from fastadapt.bench.plain import image_classifier
from fastadapt.bench.plain.image_classifier import Clock


def test_every_second_belongs_to_one_phase(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(image_classifier.time, "time", lambda: now[0])
    monkeypatch.setenv(image_classifier.STARTED, "90.0")
    clock = Clock()
    clock.lap("start")

    def loader():
        for index in range(2):
            now[0] += 3.0
            yield index

    for _ in clock.batches(loader(), "stage1"):
        now[0] += 5.0
    clock.write(tmp_path / "profile.json", accuracy=0.5)
    assert json.loads((tmp_path / "profile.json").read_text()) == {
        "start": 10.0,
        "decode": 6.0,
        "stage1": 10.0,
        "total": 26.0,
        "accuracy": 0.5,
    }
