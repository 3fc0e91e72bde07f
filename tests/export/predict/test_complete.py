"""Results that are complete are told from those that other options would give."""

import json

import pytest

from fastadapt.errors import InputError
from fastadapt.export.predict.complete import check_columns
from fastadapt.export.predict.settings import EmbedSettings, PredictSettings

PLAIN = ("path", "prediction", "probabilities_a", "probabilities_logits")


def written(folder, ending, names):
    file = folder / f"out{ending}"
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: ["x"] for name in names}), file)
    elif ending == ".csv":
        file.write_text(",".join(names) + "\n")
    else:
        file.write_text(json.dumps(dict.fromkeys(names, 1)) + "\n")
    return file


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_columns_tell(tmp_path, ending):
    file = written(tmp_path, ending, PLAIN)
    check_columns(PredictSettings(model="m"), file)
    for settings, says in (
        (PredictSettings(model="m", logits=True), "without logits, which this command asks for"),
        (PredictSettings(model="m", labels="folders"), "without target, which"),
        (PredictSettings(model="m", top_k=2), "without top_classes, which"),
        (EmbedSettings(model="m"), "without features, which"),
    ):
        with pytest.raises(InputError, match=says):
            check_columns(settings, file)
    file = written(tmp_path, ending, (*PLAIN, "embeddings_0"))
    check_columns(PredictSettings(model="m", embeddings=True), file)
    with pytest.raises(InputError, match="with embeddings, which this command leaves out"):
        check_columns(PredictSettings(model="m"), file)


def test_what_says_nothing_passes_and_what_is_damaged_does_not(tmp_path):
    (tmp_path / "no_rows.jsonl").touch()
    check_columns(PredictSettings(model="m", logits=True), tmp_path / "no_rows.jsonl")
    for name, content in (("a.jsonl", b"{"), ("a.csv", b"\xff\xfe\x00"), ("a.jsonl", b"3\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read: "):
            check_columns(PredictSettings(model="m"), tmp_path / name)
