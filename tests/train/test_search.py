import csv
import json
import multiprocessing
import os
import signal

import pytest

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.train import search_processes
from fastadapt.train.config import TrainConfig
from fastadapt.train.search import search
from fastadapt.train.search_config import NamedBackbone, SearchConfig
from fastadapt.train.search_report import LOST
from tests.helpers.imagesets import make_folders

CONFIG = TrainConfig(epochs=4, lr=3e-3, batch_size=8, select="accuracy")
ADAPT = fa.AdaptConfig(rank=16, num_centers=5, mlp_ratio=0.5)
HELD = ("epochs", "depth")


def run(data, out, how, **options):
    backbones = [NamedBackbone("test_vit", None), NamedBackbone("test_efficientnet", None)]
    options = {"image_size": 48, "pretrained": False, "workers": 1, "held": HELD, **options}
    return search(data, out, backbones, how, CONFIG, ADAPT, **options)


def test_it_searches_resumes_in_processes_and_trains_the_best(tmp_path, monkeypatch):
    for split, count in (("train", 10), ("val", 4), ("test", 4)):
        make_folders(tmp_path / "data" / split, count, seed=count)
    data, out = tmp_path / "data", tmp_path / "out"
    how = SearchConfig(trials=3, folds=2, jobs=1, confirm=1, positions=4)
    found = run(data, out, how).found
    assert sum(found["trials"].values()) == 3 and found["trials"]["ran to their end"] >= 2
    assert set(found["chosen"]["settings"]) >= {"adapter", "rank", "lr", "backbone"}
    assert not set(HELD) & set(found["chosen"]["settings"])
    assert len(found["chosen"]["folds"]) == len(found["chosen"]["other_folds"]) == 2
    assert set(found["linear_probe"]) == {"test_vit", "test_efficientnet"}
    run_results = json.loads((out / "run" / "results.json").read_text())
    assert found["test"] == run_results["test"] and "linear_probe" in run_results
    trained = fa.load_adapter(out / "run")
    assert trained.source["name"] == found["chosen"]["backbone"]

    # The first settings are those given, and the head alone; both see all folds.
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert [row["adapter"] for row in rows[:2]] == ["cladapter", "none"]
    assert rows[0]["rank"] == "16" and float(rows[0]["lr"]) == pytest.approx(3e-3)
    assert [row["folds"] for row in rows[:2]] == ["2", "2"]
    assert (out / "search.png").stat().st_size > 10_000

    with pytest.raises(InputError, match="holds a search: go on with it by `resume=True`"):
        run(data, out, how)
    with pytest.raises(InputError, match="searched with other folds: give the same settings"):
        run(data, out, SearchConfig(trials=3, folds=3, positions=4), resume=True)
    # Of two processes one is killed in its trial: the other one does all that are left.
    killed, real = [], search_processes.run_trials

    def run_trials(task, count, devices, say, tell):
        def kill(outcome):
            if not killed:
                killed.append(multiprocessing.active_children()[0].pid)
                os.kill(killed[0], signal.SIGKILL)
            say(outcome)

        real(task, count, devices, kill, killed.append)

    monkeypatch.setattr("fastadapt.train.search.run_trials", run_trials)
    more = SearchConfig(trials=9, folds=2, devices="cpu,cpu", confirm=0, positions=4)
    again = run(data, out, more, resume=True)
    assert "ended by signal 9; the others do its trial again" in killed[1]
    ended, failed = again.found["trials"], again.found["trials"]["failed"]
    assert ended["ran to their end"] + ended["pruned"] == 9 and failed <= 1
    assert again.found["chosen"]["accuracy"] >= found["chosen"]["accuracy"]
    assert len(again.found["importances"]) > 3
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == list(range(9 + failed))
    assert [row["reason"] for row in rows if row["state"] == "fail"] == [LOST] * failed


def test_bad_input_is_refused_before_anything_is_computed(tmp_path):
    make_folders(tmp_path / "data", 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    how = SearchConfig(trials=1, folds=2)
    with pytest.raises(InputError, match=r"holds other files, 'notes\.txt'"):
        run(tmp_path / "data", tmp_path / "other", how)
    with pytest.raises(InputError, match="exclude each other"):
        run(tmp_path / "data", tmp_path / "out", how, resume=True, overwrite=True)
    with pytest.raises(InputError, match="leave it out"):
        lora = fa.AdaptConfig(lora=fa.LoRAConfig())
        search(tmp_path / "data", tmp_path / "out", "test_vit", how, CONFIG, lora)
    assert not (tmp_path / "out").exists()


def test_folds_of_too_few_images_leave_the_folder_free(tmp_path):
    make_folders(tmp_path / "data", 4)
    for count in (50, 40):  # the second is not told that a search is there
        with pytest.raises(InputError, match=f"too few for {count} folds"):
            run(tmp_path / "data", tmp_path / "out", SearchConfig(folds=count))
