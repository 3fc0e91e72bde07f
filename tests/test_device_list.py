"""One grammar for ``--devices`` of all commands that have the option."""

import pytest
import torch

from fastadapt.device_list import check_devices, expand_devices
from fastadapt.errors import InputError
from fastadapt.export.predict.settings import WorkSettings
from fastadapt.train.fold_settings import FoldSettings
from fastadapt.train.search_config import SearchConfig
from tests.helpers.command import command


def test_devices_are_all_or_a_list(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given in ("all", "0, 1", "cuda:0,1", ("all",), ("0", "cuda:1")):
        assert expand_devices(given) == ("cuda:0", "cuda:1")
    assert expand_devices("cpu,cpu") == ("cpu", "cpu")
    assert expand_devices("cuda:1,cpu,1") == ("cuda:1", "cpu", "cuda:1")
    for given in ("", ",", "0,", "tpu", "cuda", "auto", "all,0", "-1", "cuda:x", "٣", ()):
        with pytest.raises(InputError, match=r"^devices is .*; expected all, or devices with"):
            check_devices(given)
        with pytest.raises(InputError, match="expected all"):
            expand_devices(given)
    with pytest.raises(InputError, match="devices is '0,2', but 2 are there, from 0"):
        expand_devices("0,2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert expand_devices("all") == ("cpu",)
    with pytest.raises(InputError, match="'cuda:0', but PyTorch finds no GPU"):
        expand_devices("cuda:0")


def test_every_command_reads_the_same(tmp_path, monkeypatch, capsys):
    given = {"images": ("x",), "out": tmp_path / "x.csv"}
    for value in ("cpu,cpu", ("cpu", "cpu")):
        assert FoldSettings(folds=3, devices=value).devices == value
        assert SearchConfig(devices=value).devices == value
        assert WorkSettings(**given, devices=value).devices == value
    out = ("--out", tmp_path / "out")
    for words in (
        ("train", "data", "--backbone", "test_vit", "--folds", "3", *out),
        ("search", "data", "--backbone", "test_vit", *out),
        ("predict", "bundle", "images", "--out", tmp_path / "out.csv"),
        ("embed", "test_vit", "images", "--out", tmp_path / "out.csv"),
    ):
        assert command(monkeypatch, *words, "--devices", "0,tpu") == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and "--devices is '0,tpu'; expected all, or devices" in said[0]
