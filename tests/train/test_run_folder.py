"""Whose files in a run folder are whose: only what its own formats prove a run's may go."""

import json

import numpy as np
import pytest
import torch

from fastadapt.errors import InputError
from fastadapt.files import write_tensors
from fastadapt.locks import LOCK
from fastadapt.train import run_folder
from fastadapt.train.cache_file import is_cache, open_cache, writing
from fastadapt.train.request import Request
from fastadapt.train.run_folder import (
    State,
    check_folder,
    load_state,
    remove_leftovers,
    save_state,
)
from tests.train.test_run import QUICK, data, run  # noqa: F401

CACHED = f"{'0' * 24}.npy"


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"model_type": "vit"}', "labels.txt": "mine", "results.json": "{}"},
        {"config.json": "no JSON"},
        {"results.json": "{}"},
        {"labels.txt": "mine"},
        {"state.safetensors": "mine"},
        {"run.json": '{"format": "gait"}'},
        {"cache/mine.npy": "mine"},
        {f"cache/{CACHED}": "mine"},
        {".mine.tmp": "mine"},
        {".thesis.tex.abcd1234.tmp": "mine"},
    ],
)
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_names_like_ours_are_no_proof(tmp_path, files, how):
    out = put(tmp_path / "out", files)
    first = sorted(files)[0].partition("/")[0]
    with pytest.raises(InputError, match=rf"holds .*, '{first}' for one"):
        check_folder(out, how.get("resume", False), how.get("overwrite", False))
    for name, content in files.items():
        assert (out / name).read_text() == content


def test_what_a_killed_run_leaves_is_ours(tmp_path):
    out = put(tmp_path / "out", {f".config.json.{'a' * 8}.tmp": "", LOCK: ""})
    (out / "cache").mkdir()
    with writing(out / "cache" / CACHED, (1, 2, 1, 3), torch.float32) as file:
        file.write(torch.ones(2, 1, 3))
    put(out, {f"cache/.{CACHED}.abcd1234.tmp": ""})
    check_folder(out, resume=True, overwrite=False)
    check_folder(out, resume=False, overwrite=False)
    remove_leftovers(out)
    assert sorted(p.name for p in out.rglob("*")) == sorted([LOCK, "cache", CACHED])
    Request("data", "vit").write(out)
    check_folder(out, resume=False, overwrite=False)  # no epoch was completed
    save_state(State(), {}, out / "state.safetensors")
    with pytest.raises(InputError, match="holds an unfinished run"):
        check_folder(out, resume=False, overwrite=False)
    (out / "run.json").unlink()
    assert run_folder.is_run(out)


def test_caches_are_told_from_other_arrays(tmp_path):
    np.save(tmp_path / CACHED, np.ones(3))
    assert not is_cache(tmp_path / CACHED)
    with writing(tmp_path / CACHED, (1, 2, 1, 3), torch.float32) as file:
        file.write(torch.ones(2, 1, 3))
    assert is_cache(tmp_path / CACHED)
    assert open_cache(tmp_path / CACHED, (1, 2, 1, 3)) is not None
    (tmp_path / CACHED).rename(tmp_path / "mine.npy")
    assert not is_cache(tmp_path / "mine.npy")
    for wrong in ({"shape": (1, 1, 2, 3)}, {"shape": (1, 2, 1, 3), "dtypes": ("float16",)}):
        (tmp_path / CACHED).write_bytes((tmp_path / "mine.npy").read_bytes())
        assert open_cache(tmp_path / CACHED, **wrong) is None


def test_files_of_others_survive_in_a_run(tmp_path, data):  # noqa: F811
    from dataclasses import replace

    out, mine = tmp_path / "run", {"notes.md": "1", ".mine.tmp": "2", "bundle/x": "3"}
    config = replace(QUICK, epochs=1)
    run(data, out, config)
    put(out, mine)
    np.save(out / "cache" / "mine.npy", np.ones(3))
    np.save(out / "cache" / f"{'1' * 24}.npy", np.ones(3))
    with pytest.raises(InputError, match="holds a run already"):
        run(data, out, config)
    run(data, out, replace(config, feature_dtype="fp32"), overwrite=True)
    assert {name: (out / name).read_text() for name in mine} == mine
    assert len(list((out / "cache").iterdir())) == 4


def test_a_second_train_into_one_folder_is_refused(tmp_path, data):  # noqa: F811
    from fastadapt.locks import lock_folder

    with lock_folder(tmp_path / "run"):
        with pytest.raises(InputError, match="run is being written by process"):
            run(data, tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_model_is_not_saved_over_anothers_configuration(tmp_path):
    import fastadapt as fa

    put(tmp_path, {"config.json": json.dumps({"model_type": "vit"})})
    model = fa.adapt("test_vit", fa.AdaptConfig("none"), 2, pretrained=False)
    with pytest.raises(InputError, match="was not written by fastadapt"):
        fa.save_adapter(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_flipped_bit_in_a_state_is_refused(tmp_path):
    state = State(stage=1, epoch=2, history=[{"epoch": 1}], model={"w": torch.arange(4.0)})
    state.optimizer = {0: {"step": torch.tensor(3.0)}}
    path = tmp_path / "state.safetensors"
    save_state(state, {"lr": 0.5}, path)
    found, settings = load_state(path)
    assert settings == {"lr": 0.5} and found.history == [{"epoch": 1}]
    assert torch.equal(found.optimizer[0]["step"], torch.tensor(3.0))
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"damaged|no complete safetensors"):
            load_state(path)
    numbers = '{"stage": 1, "epoch": 1}'  # of a version that wrote no hashes
    write_tensors(path, {"model.w": torch.ones(1)}, {"state": numbers, "settings": "{}"})
    assert load_state(path)[0].epoch == 1
