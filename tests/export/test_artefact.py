import json

import pytest

import fastadapt as fa
from fastadapt.export.artefact import VERIFIED, Artefact
from fastadapt.export.parity import Parity
from fastadapt.export.settings import Batches


class TestBatches:
    def test_parse(self):
        assert Batches.parse("1:8:32") == Batches(1, 8, 32)
        assert Batches.parse("4") == Batches(4, 4, 4)
        assert str(Batches(1, 2, 3)) == "1:2:3"

    @pytest.mark.parametrize(
        "text", ["", "1:2", "0:1:2", "2:1:3", "1:4:3", "a:b:c", "1:2:3:4", "-1"]
    )
    def test_bad_ones_are_named(self, text):
        with pytest.raises(fa.InputError, match="batch is "):
            Batches.parse(text)

    @pytest.mark.parametrize(
        "batch,checked",
        [
            ((1, 8, 32), (1, 5, 8, 32)),
            ((1, 5, 8), (1, 3, 5, 8)),
            ((8, 16, 32), (8, 16, 31, 32)),
            ((1, 2, 4), (1, 2, 3, 4)),
            ((4, 4, 4), (4,)),
            ((1, 2, 2), (1, 2)),
        ],
    )
    def test_gate_sees_the_ends_the_middle_and_an_odd_one(self, batch, checked):
        assert Batches(*batch).checked == checked


def test_artefact_survives_json():
    parity = Parity("engine", 5, 16, error=1e-4, problems=("no",))
    artefact = Artefact("onnx", "m.onnx", "fp16", VERIFIED, "", (parity,), {"CPU": {"1": 2.0}})
    assert Artefact.from_dict(json.loads(json.dumps(artefact.to_dict()))) == artefact
