"""Results that are complete are told from those that another model or options would give."""

import json
import shutil

import pytest
import timm
import torch

from fastadapt.errors import InputError
from fastadapt.export.predict.complete import check_columns
from fastadapt.export.predict.settings import EmbedSettings, PredictSettings
from fastadapt.files import read_json, read_tensors, write_tensors
from tests.helpers.command import command

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


def test_results_of_another_model_or_of_other_images_are_refused(
    made, tmp_path, monkeypatch, capsys
):
    images = shutil.copytree(made / "images", tmp_path / "images")
    out, note = tmp_path / "out.csv", tmp_path / "out.csv.job.json"

    def run(model, *options, name="predict", file=out, code=1):
        assert command(monkeypatch, name, model, images, "--out", file, *options) == code
        said = capsys.readouterr()
        assert said.err.count("\n") <= 1
        return said.err

    run(made / "bundle", code=0)
    noted = read_json(note)
    assert (noted["command"], noted["images"]["count"]) == ("predict", 24)
    assert run(made / "bundle", "--resume", code=0).endswith("there is nothing to resume\n")
    said = run(made / "run", "--resume")  # with the same columns
    assert "is complete, and was made with another model (bundle " in said
    # Two runs that differ in one weight.
    other, rows = shutil.copytree(made / "run", tmp_path / "other"), tmp_path / "rows.jsonl"
    weights, metadata = read_tensors(other / "adapter.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    write_tensors(other / "adapter.safetensors", weights, metadata)
    run(made / "run", file=rows, code=0)
    assert "another model (adapter_sha256 " in run(other, "--resume", file=rows)
    run(made / "run", "--top-k", 2, "--overwrite", file=rows, code=0)
    said = run(made / "run", "--top-k", 1, "--resume", file=rows)
    assert "another top_k (2, now 1): give the same, replace it with --overwrite, or" in said

    shutil.copy(images / "good" / "1.png", images / "good" / "new.png")
    assert "was made of other images (count 24, now 25)" in run(made / "bundle", "--resume")
    (images / "good" / "new.png").unlink()
    # What is not of these results says nothing of them.
    out.write_text(out.read_text().replace("crack", "good"))
    assert "Nothing beside it tells of which model" in run(made / "bundle", "--resume", code=0)
    note.unlink()
    assert "Nothing beside it tells of which model" in run(made / "run", "--resume", code=0)

    weights, features = tmp_path / "resnet.pth", tmp_path / "features.jsonl"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), weights)
    size = ("test_resnet", "--weights", weights, "--image-size")
    run(*size, 32, name="embed", file=features, code=0)
    said = run(*size, 48, "--resume", name="embed", file=features)
    assert "another model (image_size 32, now 48)" in said
