"""Checkpoints as frameworks write them: the right tensors are read, and nothing is run."""

import argparse
import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fastadapt.checkpoint_reader import find_state_dict, read_checkpoint, read_state_dict
from fastadapt.errors import InputError

torch.manual_seed(0)
RAW = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3)}
EMA = {name: tensor + 1 for name, tensor in RAW.items()}


def prefixed(prefix, state=RAW):
    return {prefix + name: tensor for name, tensor in state.items()}


class Scheduler:
    """As dassl's trainer saves: an object of a class of its own."""

    def __init__(self):
        self.optimizer = nn.Linear(1, 1)
        self.factor = lambda_free


def lambda_free(epoch):
    return epoch


FILES = {
    "raw": (RAW, RAW),
    "ordered": (collections.OrderedDict(RAW), RAW),
    "DataParallel": (prefixed("module."), RAW),
    "torch.compile": (prefixed("_orig_mod."), RAW),
    "both": (prefixed("module._orig_mod."), RAW),
    "compiled inside": ({"a._orig_mod.weight": RAW["a.weight"], "a.bias": RAW["a.bias"]}, RAW),
    "Lightning": ({"state_dict": prefixed("model."), "pytorch-lightning_version": "2.4.0"}, RAW),
    "net": ({"net": RAW, "epoch": 1}, RAW),
    "timm train.py": (
        {
            "epoch": 3,
            "state_dict": RAW,
            "args": argparse.Namespace(lr=0.1),
            "metric": np.float64(1),
        },
        RAW,
    ),
    "dassl": ({"state_dict": RAW, "epoch": 15, "scheduler": Scheduler(), "val_result": None}, RAW),
    "EMA beside raw": ({"epoch": 3, "state_dict": RAW, "state_dict_ema": EMA}, EMA),
    "averaged": ({"n_averaged": torch.tensor(3), **prefixed("module.")}, RAW),
    "optimizer": (
        {"model": RAW, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "groups": []}},
        RAW,
    ),
    "parameters": ({name: nn.Parameter(tensor) for name, tensor in RAW.items()}, RAW),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_real_files(tmp_path, name, legacy):
    content, want = FILES[name]
    path = tmp_path / "model.pth.tar-15"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(path)
    assert found.state.keys() == want.keys()
    for key, tensor in want.items():
        assert torch.equal(found.state[key], tensor)


def test_several_candidates_are_said_and_one_can_be_chosen(tmp_path):
    torch.save({"state_dict": RAW, "state_dict_ema": EMA}, tmp_path / "m.pth")
    found = read_checkpoint(tmp_path / "m.pth")
    assert found.candidates == ("state_dict", "state_dict_ema")
    assert found.choice.startswith("'state_dict_ema' was taken, not state_dict")
    with pytest.warns(UserWarning, match="several state dicts: 'state_dict_ema' was taken"):
        read_state_dict(tmp_path / "m.pth")
    assert torch.equal(read_state_dict(tmp_path / "m.pth", "state_dict")["a.bias"], RAW["a.bias"])
    with pytest.raises(InputError, match="no state dict 'net'; it has 'state_dict', 'state_dict_e"):
        read_checkpoint(tmp_path / "m.pth", "net")


def test_a_key_may_end_in_a_prefix_of_names():
    lightning = {"state_dict": {**prefixed("model."), **prefixed("ema_model.", EMA)}}
    found = find_state_dict(lightning, "m.ckpt", "state_dict.ema_model")
    assert torch.equal(found.state["a.bias"], EMA["a.bias"]) and set(found.state) == set(RAW)


def test_equals_among_candidates_are_named():
    with pytest.raises(InputError, match="'student', 'teacher': name one with `checkpoint_key"):
        find_state_dict({"student": RAW, "teacher": EMA}, "dino.pth")


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class TestNothingRuns:
    @pytest.fixture(params=["exec", "system", "getattr"])
    def evil(self, request, tmp_path):
        ran = tmp_path / "ran"
        code = f"open({str(ran)!r}, 'w')"
        yield {
            "exec": Evil(exec, (code,)),
            "system": Evil(os.system, (f"touch {ran}",)),
            "getattr": Evil(getattr, (Evil(__import__, ("os",)), "getcwd")),
        }[request.param]
        assert not ran.exists()

    @pytest.mark.parametrize("legacy", [False, True])
    def test_beside_weights(self, tmp_path, evil, legacy):
        path = tmp_path / "m.pth"
        content = {"state_dict": RAW, "evil": evil, "list": [evil], "dict": {"x": evil}}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert set(read_checkpoint(path).state) == set(RAW)

    def test_instead_of_weights(self, tmp_path, evil):
        for content in (evil, {"state_dict": evil}, {"w": RAW["a.bias"], "x": evil}):
            torch.save(content, tmp_path / "m.pth")
            with pytest.raises(InputError, match="could run code"):
                read_checkpoint(tmp_path / "m.pth")
            (tmp_path / "m.pth").write_bytes(pickle.dumps(content))
            with pytest.raises(InputError, match="could run code"):
                read_checkpoint(tmp_path / "m.pth")

    def test_functions_that_rebuild_cannot_be_changed(self, tmp_path):
        # BUILD on a function: its code or defaults would be replaced for the whole process.
        stream = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00xK\x01sb."
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("m/data.pkl", stream)
            archive.writestr("m/version", "3")
            archive.writestr("m/byteorder", "little")
        (tmp_path / "m.pth").write_bytes(file.getvalue())
        with pytest.raises(InputError, match="cannot be read as weights alone"):
            read_checkpoint(tmp_path / "m.pth")

    def test_a_pickled_model_is_named(self, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "m.pth")
        with pytest.raises(InputError, match=r"Linear, which could run code.*model\.state_dict"):
            read_checkpoint(tmp_path / "m.pth")

    def test_torchscript(self, tmp_path):
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "m.pt")
        with pytest.raises(InputError, match="TorchScript program, which could run code"):
            read_checkpoint(tmp_path / "m.pt")


class TestDamage:
    def test_no_weights_at_all(self, tmp_path):
        with pytest.raises(InputError, match="is a folder; expected a file of weights"):
            read_checkpoint(tmp_path)
        (tmp_path / "model.pth").write_bytes(b"\x08\x0a" * 50)  # as an ONNX file begins
        with pytest.raises(InputError, match="it is no file of torch"):
            read_checkpoint(tmp_path / "model.pth")

    def test_truncated(self, tmp_path):
        torch.save({"state_dict": RAW, "args": argparse.Namespace()}, tmp_path / "m.pth")
        whole = (tmp_path / "m.pth").read_bytes()
        for size in (0, 10, len(whole) // 2, len(whole) - 10):
            (tmp_path / "m.pth").write_bytes(whole[:size])
            with pytest.raises(InputError) as caught:
                read_checkpoint(tmp_path / "m.pth")
            assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)

    def test_a_compressed_archive_cannot_take_all_memory(self, tmp_path):
        torch.save(RAW, tmp_path / "m.pth")
        with (
            zipfile.ZipFile(tmp_path / "m.pth") as archive,
            zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
        ):
            for member in archive.infolist():
                bomb.writestr(member.filename, archive.read(member))
        with pytest.raises(InputError, match="compressed archive"):
            read_checkpoint(tmp_path / "b.pth")

    def test_dictionaries_that_hold_themselves(self):
        value = {"epoch": 1}
        value["self"] = value
        with pytest.raises(InputError, match="no state dict"):
            find_state_dict(value, "m.pth")


class TestDamagedBytes:
    def test_a_member_that_is_not_what_its_checksum_says(self, tmp_path):
        path = tmp_path / "model.pth"
        torch.save({"a": torch.arange(1000.0)}, path)
        data = bytearray(path.read_bytes())
        data[data.index(torch.arange(1000.0).numpy().tobytes()[400:440])] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match="data/0 is not what its checksum says"):
            read_checkpoint(path)

    def test_files_without_checksums_are_read(self, tmp_path):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(RAW, tmp_path / "model.pth")
        finally:
            torch.serialization.set_crc32_options(True)
        assert read_checkpoint(tmp_path / "model.pth").state.keys() == RAW.keys()

    @pytest.mark.parametrize(
        "code", [b"\x80\x02]r\xff\xff\xff\x7f.", b"\x80\x05\x96" + b"\xff" * 7]
    )
    def test_numbers_reserve_no_memory(self, code, tmp_path):
        """An object's number, 2^31 - 1, and the length of an array that is not there."""
        (tmp_path / "model.bin").write_bytes(code + b"\0" * 9)
        with pytest.raises(InputError, match="cannot be read as weights alone"):
            read_checkpoint(tmp_path / "model.bin")

    def test_tensors_that_claim_more_than_the_file_holds(self, tmp_path):
        torch.save({"a": torch.zeros(1).expand(2**30)}, tmp_path / "model.pth")
        with pytest.raises(InputError, match="claim 4,294,967,296 bytes"):
            read_checkpoint(tmp_path / "model.pth")

    def test_dictionaries_that_are_named_a_billion_times(self):
        inner = {str(index): 1 for index in range(1000)}
        middle = {str(index): inner for index in range(1000)}
        with pytest.raises(InputError, match="dictionaries in dictionaries"):
            find_state_dict({str(index): middle for index in range(1000)}, "it")
