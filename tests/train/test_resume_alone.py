"""What a run recorded is enough to go on with it; a trained adapter is where another begins."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.train.request import Request, is_finished
from fastadapt.train.run import train
from fastadapt.train.run_folder import check_finished
from tests.helpers.imagesets import CLASSES, make_folders
from tests.train.test_run import (  # noqa: F401
    ADAPT,
    OPTIONS,
    QUICK,
    command,
    data,
    interrupt_after,
    run,
    same_run,
)


def test_a_run_goes_on_alone_to_the_same(tmp_path, data, command, monkeypatch):  # noqa: F811
    asked = ("--backbone", "test_vit", *OPTIONS, "--augment", "flips", "--views", "2")
    args = ("train", data, *asked, "--workers", "1", "--quiet")
    assert command(*args, "--out", tmp_path / "whole")[0] == 0
    assert not (tmp_path / "whole" / "run.json").exists()
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert command(*args, "--out", out)[0] == 130
    for wrong, says in {
        ("--epochs", "3"): "--epochs cannot be given with --resume and no DATA",
        ("--overwrite",): "exclude each other",
    }.items():
        code, error = command("train", "--resume", "--out", out, *wrong)
        assert code == 1 and says in error and error.count("\n") == 1
    with pytest.raises(InputError, match="unfinished run: resume its training"):
        check_finished(out)
    monkeypatch.chdir(out)  # whatever the working folder
    assert command("train", "--resume", "--out", ".", "--workers", "1", "--quiet") == (0, "")
    same_run(tmp_path / "whole", out)
    before = (out / "adapter.safetensors").stat().st_mtime_ns
    assert command("train", "--resume", "--out", out, "--quiet") == (0, "")
    assert (out / "adapter.safetensors").stat().st_mtime_ns == before
    code, error = command("train", "--resume", "--out", tmp_path / "gone")
    assert code == 1 and "no run to resume" in error
    code, error = command("train", "--out", tmp_path / "gone", "--backbone", "test_vit")
    assert code == 1 and "DATA is missing" in error


def test_what_was_asked_for_is_read_as_it_was_written(tmp_path):
    lora = replace(ADAPT, lora=fa.LoRAConfig(r=2))
    request = Request("/data", "vit", QUICK, lora, {"crop_pct": 0.9}, False, "/w.pth", True, "/run")
    request.write(tmp_path)
    assert Request.read(tmp_path) == request and not is_finished(tmp_path)
    whole = json.loads((tmp_path / "run.json").read_text())
    for change in (
        {"data": 3},
        {"preprocess": []},
        {"version": 2},
        {"format": "gait"},
        {"config": {"epochs": 0}},
        {"config": None},
        {"adapt_config": {"rank": "x"}},
        {"folds": {"folds": -1}},
    ):
        (tmp_path / "run.json").write_text(json.dumps(whole | change))
        with pytest.raises(InputError, match=r"run\.json"):
            Request.read(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match="does not say how it was started"):
        Request.read(tmp_path)


def test_an_overwritten_run_that_was_killed_early_goes_on_anew(tmp_path, data):  # noqa: F811
    out, config = tmp_path / "run", replace(QUICK, epochs=1)
    run(data, out, config)
    other = replace(config, seed=1)
    Request(str(data), "test_vit", other, ADAPT, {}, False).write(out)  # then it was killed
    with pytest.raises(InputError, match="unfinished run"):
        check_finished(out)
    result = run(data, out, other, resume=True)
    assert result.trained and not (out / "run.json").exists()
    Request(str(data), "test_vit", other, ADAPT, {}, False).write(out)
    assert not run(data, out, other, resume=True).trained  # equal settings: it is that result
    check_finished(out)


def test_training_starts_from_a_run(tmp_path, data):  # noqa: F811
    first, config = tmp_path / "first", replace(QUICK, epochs=1, lr=1e-12, probe=False)
    run(data, first, replace(QUICK, stages=2, epochs=1, epochs2=1, lr2=1e-3, select="loss"))
    state = load_file(first / "adapter.safetensors")

    def start(folder, out, **more):
        options = {"workers": 1, "init": first, **more}
        return train(folder, tmp_path / out, None, config, **options)

    start(data, "same")
    same = load_file(tmp_path / "same" / "adapter.safetensors")
    assert same.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(same[name], tensor, atol=1e-6, rtol=1e-5)
    two = make_folders(tmp_path / "two", 8, CLASSES[:2])
    start(two, "other")
    other = load_file(tmp_path / "other" / "adapter.safetensors")
    assert other["head.weight"].shape[0] == 2
    for name in state.keys() - {"head.weight", "head.bias"}:
        torch.testing.assert_close(other[name], state[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="leave `adapt_config` out"):
        start(two, "no", adapt_config=ADAPT)
    with pytest.raises(InputError, match="trained on test_vit_shallow, not on test_resnet"):
        train(two, tmp_path / "no", "test_resnet", config, workers=1, init=first)
    with pytest.raises(InputError, match="give a `backbone`, or a run"):
        start(two, "no", init=None)
    assert not (tmp_path / "no").exists()
