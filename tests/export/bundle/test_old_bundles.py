"""A run and a bundle that version 7e63983 wrote still load and verify."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import fastadapt as fa
from fastadapt.export import load, verify_bundle, write_repository
from fastadapt.files import read_tensors

DATA = Path(__file__).parents[1] / "data"


def test_a_bundle_of_schema_2(tmp_path):
    bundle = shutil.copytree(DATA / "bundle_schema_2", tmp_path / "b")
    result = verify_bundle(bundle, speed=False)
    assert result.passed and result.manifest["schema"] == 2
    golden = load_file(bundle / "golden.safetensors")
    found = load(bundle)(np.moveaxis(golden["images"], 1, -1))
    assert found.classes == ("crack", "good")
    assert write_repository(bundle, tmp_path / "models").name == "b"


def test_its_damage_is_found(tmp_path):
    bundle = shutil.copytree(DATA / "bundle_schema_2", tmp_path / "b")
    (bundle / "labels.txt").write_text("good\ncrack\n")
    with pytest.raises(fa.InputError, match=r"labels\.txt was changed"):
        verify_bundle(bundle)


def test_a_run_gives_the_bundles_outputs():
    backbone = nn.Conv2d(3, 8, 4)
    backbone.load_state_dict(read_tensors(DATA / "run_7e63983" / "backbone.safetensors")[0])
    model = fa.load_adapter(DATA / "run_7e63983", backbone).eval()
    golden, _ = read_tensors(DATA / "bundle_schema_2" / "golden.safetensors")
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        got = model((golden["images"].float() / 255 - mean) / std)
    torch.testing.assert_close(got, golden["expected"], rtol=1e-4, atol=1e-5)
