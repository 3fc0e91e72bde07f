"""The class that engines call in their workers: paths in, rows out."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from fastadapt.data.decode_pool import DecodePool
from fastadapt.export import BatchPredictor, load


def test_paths_in_rows_out(made, tmp_path):
    paths = sorted(str(path) for path in (made / "images").rglob("*.png"))[:7]
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    predict = BatchPredictor(str(made / "bundle"), batch=3)
    want = load(made / "bundle")(paths)
    memory = DecodePool.memory
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(DecodePool, "memory", lambda *a: (asked.append(a), memory(*a))[1])
        for _ in range(2):  # a worker is called again and again
            given = [*paths[:4], str(bad), *paths[4:]]
            rows = predict({"path": np.array(given), "id": np.arange(8)})
        assert len(asked) == 1
    named_in_bytes = predict({"path": np.array(paths[:2], dtype=bytes)})
    assert named_in_bytes["prediction"].tolist() == want.labels[:2]
    predict.close()
    assert rows["path"].tolist() == given and rows["id"].tolist() == list(range(8))
    readable = [0, 1, 2, 3, 5, 6, 7]
    assert rows["prediction"][readable].tolist() == want.labels and rows["prediction"][4] == ""
    for name in ("logits", "probabilities"):
        np.testing.assert_allclose(rows[name][readable], getattr(want, name), atol=1e-5)
        assert np.isnan(rows[name][4]).all()
    assert [bool(problem) for problem in rows["problem"]] == [i == 4 for i in range(8)]


def test_threads_share_one_stream(made, monkeypatch):
    paths = sorted(str(path) for path in (made / "images").rglob("*.png"))[:20]
    predict = BatchPredictor(str(made / "bundle"), batch=3, workers=2)
    want = dict(zip(paths, predict.outputs(paths)[0], strict=True))
    passes, decode = [], predict._decode
    monkeypatch.setattr(predict, "_decode", lambda batches: (passes.append(1), decode(batches))[1])
    rng = np.random.default_rng(0)
    lists = [rng.choice(paths, size).tolist() for size in rng.integers(0, 12, 24)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(predict.outputs, lists))
    predict.close()
    for asked, (values, problems) in zip(lists, found, strict=True):
        assert problems == [""] * len(asked) and len(values) == len(asked)
        for path, row in zip(asked, values, strict=True):
            np.testing.assert_allclose(row, want[path], atol=1e-5)
    assert len(passes) < len(lists)  # a call's images follow those of another


def test_what_breaks_ends_the_calls_of_all_threads(made):
    paths = sorted(str(path) for path in (made / "images").rglob("*.png"))[:12]
    predict = BatchPredictor(str(made / "bundle"), batch=2, workers=2)
    want, _ = predict.outputs(paths)
    whole = predict.model

    def broken(pixels):
        time.sleep(0.1)  # the others' calls are there by then
        raise RuntimeError("out of memory")

    predict.model = replace(whole, run=broken)
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(predict.outputs, paths) for _ in range(3)]
    for call in calls:
        with pytest.raises(RuntimeError, match="out of memory"):
            call.result()
    predict.model = whole  # images of the broken pass are not taken for those of the next
    np.testing.assert_array_equal(predict.outputs(paths[::-1])[0], want[::-1])
    predict.close()
