"""The class that engines call in their workers: paths in, rows out."""

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
    predict.close()
    assert rows["path"].tolist() == given and rows["id"].tolist() == list(range(8))
    readable = [0, 1, 2, 3, 5, 6, 7]
    assert rows["prediction"][readable].tolist() == want.labels and rows["prediction"][4] == ""
    for name in ("logits", "probabilities"):
        np.testing.assert_allclose(rows[name][readable], getattr(want, name), atol=1e-5)
        assert np.isnan(rows[name][4]).all()
    assert [bool(problem) for problem in rows["problem"]] == [i == 4 for i in range(8)]
