"""Weights: a file that is read gives the tensors that its bytes hold, and runs nothing."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fastadapt.checkpoint_reader import read_checkpoint
from fastadapt.files import read_tensors
from tests.helpers.fuzz.mutations import mutate_bytes, mutate_json, random_value
from tests.helpers.fuzz.target import ACCEPTED, UNJUDGED, Target

MARK = "FUZZ_CODE_RAN"
DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "U8": np.uint8, "F16": np.float16}


def sound_state() -> dict[str, Tensor]:
    """Make a small state dict."""
    torch.manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "norm.running_var": torch.rand(4).double(),
        "norm.num_batches_tracked": torch.tensor(7),
        "head.weight": torch.randn(5, 4).half(),
        "head.bias": torch.randn(5),
    }


class _Runs:
    """Sets an environment variable when it is unpickled by a pickle that runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.environ[{MARK!r}] = '1'",)


class Safetensors(Target):
    """Damaged safetensors files."""

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Read one; compare with the values at the places that its header states."""
        data = safetensors.torch.save(sound_state(), {"format": "pt"})
        if choose.random() < 0.6:
            size = struct.unpack("<Q", data[:8])[0]
            header = json.dumps(mutate_json(choose, json.loads(data[8 : 8 + size]))).encode()
            stated = len(header) if choose.random() < 0.8 else choose.choice((0, 1, 2**40, 2**63))
            data = struct.pack("<Q", stated) + header + data[8 + size :]
        else:
            data = mutate_bytes(choose, data)
        path = scratch / "model.safetensors"
        path.write_bytes(data)
        found = read_tensors(path)[0]
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        if header.keys() != found.keys():
            return f"tensors {sorted(found)}, the header names {sorted(header)}"
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                continue
            start, stop = entry["data_offsets"]
            raw = data[8 + size + start : 8 + size + stop]
            wanted = np.frombuffer(raw, DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if found[name].numpy().tobytes() != wanted.tobytes():
                return f"{name} has other values than the file"
        return ACCEPTED


class Checkpoints(Target):
    """Damaged files of ``torch.save``, new and old, of trainers that add objects of their own."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        state = sound_state()
        self.state = state
        values = {
            "plain": state,
            "trainer": {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
            "code": {"state_dict": state, "callback": _Runs()},
        }
        self.files = {}
        for name, value in values.items():
            for new in (True, False):
                file = io.BytesIO()
                torch.save(value, file, _use_new_zipfile_serialization=new)
                self.files[name, new] = file.getvalue()

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Read one; compare with what was saved, and see that nothing was run."""
        import os

        os.environ.pop(MARK, None)
        name, new = choose.choice(list(self.files))
        data = self.files[name, new]
        how = choose.randrange(4)
        if new and how == 0:
            data = _rewritten(choose, data)
        elif how == 1:
            data = pickle.dumps(_any_pickle(choose))
        else:
            others = [other for key, other in self.files.items() if key[1] == new]
            data = mutate_bytes(choose, data, others)
        path = scratch / f"model{choose.choice(('.pth', '.bin', '.tar', '.ckpt'))}"
        path.write_bytes(data)
        try:
            found = read_checkpoint(path).state
        finally:
            if os.environ.pop(MARK, None):
                raise AssertionError("the file's code was run")
        if all(_same(found.get(key), tensor) for key, tensor in self.state.items()):
            return ACCEPTED
        if not zipfile.is_zipfile(path):
            return UNJUDGED  # the old format has no checksums
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"accepted though {broken} is not what its checksum says"
        return UNJUDGED  # rewritten with fitting checksums


def _same(found: Tensor | None, wanted: Tensor) -> bool:
    return found is not None and found.dtype == wanted.dtype and torch.equal(found, wanted)


def _rewritten(choose: random.Random, data: bytes) -> bytes:
    """Change a member of the archive, with checksums that fit."""
    source, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    changed = choose.choice(source.namelist())
    kind = choose.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name in source.namelist():
            content = source.read(name)
            if name == changed:
                if choose.random() < 0.2:
                    continue
                content = mutate_bytes(choose, content)
                if choose.random() < 0.05:
                    content = bytes(3_000_000)
            archive.writestr(name, content)
    return file.getvalue()


def _any_pickle(choose: random.Random) -> Any:
    kind = choose.randrange(4)
    if kind == 0:
        return _Runs()
    if kind == 1:
        return {"state_dict": random_value(choose)}
    if kind == 2:
        return {"a": np.zeros(3), "b": _Runs()}
    return random_value(choose)
