"""The benchmark of runtimes on a CPU, with a small model and short rounds."""

import pytest

import fastadapt as fa
from fastadapt.bench import deployed_calls
from fastadapt.bench.suites import cpu_runtimes, deployment
from fastadapt.bench.suites.cpu_runtimes import RIVAL, Provider, Results
from tests.helpers.shallow_models import SHALLOW_VIT


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cpu_runtimes, "SUBJECTS", (deployment.Subject("ViT", SHALLOW_VIT, 1e9),))
    monkeypatch.setattr(deployment, "SIZE", 160)
    monkeypatch.setattr(deployed_calls, "SIZE", 160)
    monkeypatch.setattr(cpu_runtimes, "SECONDS", 0.01)


def test_runtimes_take_turns(small, monkeypatch):
    pytest.importorskip("openvino")
    wrong = Provider("model.wrong.xml", write_wrong, ("openvino",))
    providers = {
        RIVAL: cpu_runtimes.PROVIDERS[RIVAL],
        "OpenVINO fp32": cpu_runtimes.PROVIDERS["OpenVINO fp32"],
        "Wrong": wrong,
        "Coarse": Provider("model.coarse.xml", write_wrong, ("openvino",), "fp8"),
        "Absent": Provider("model.x", write_wrong, ("no_such_package",)),
    }
    monkeypatch.setattr(cpu_runtimes, "PROVIDERS", providers)
    first, last = cpu_runtimes.run(quick=True)
    (rows,) = (rows for title, rows in last.tables.items() if "images per second" in title)
    assert [row["runtime"] for row in rows] == [RIVAL, "OpenVINO fp32", "target of the best"]
    assert rows[0]["1, ratio"] == rows[0]["8, ratio"] == "1.00"
    assert last.wrong == ["ViT, Wrong"]
    assert any(note.startswith("ViT, Coarse: not timed, ") for note in last.notes)
    assert "Absent: left out, no_such_package is not installed" in last.notes
    assert first.progress == "ViT, round 1"


def test_a_choice_runs_beside_onnx_runtime(small, monkeypatch):
    prepared = []

    def prepare(results, providers, folder, batch):
        prepared.extend(providers)
        return {}

    monkeypatch.setattr(cpu_runtimes, "_prepare", prepare)
    monkeypatch.setenv(cpu_runtimes.CHOICE, "vit.*litert")
    last = list(cpu_runtimes.run(quick=True))[-1]
    assert prepared == [RIVAL, "LiteRT fp32", "LiteRT INT8"]
    assert last.about == ("ViT",)
    assert "chosen: FASTADAPT_CPU_RUNTIMES='vit.*litert'" in last.notes
    monkeypatch.setenv(cpu_runtimes.CHOICE, "warp")
    with pytest.raises(fa.InputError, match="FASTADAPT_CPU_RUNTIMES chooses nothing"):
        next(cpu_runtimes.run())


def write_wrong(files, path):
    """Convert a model of other weights."""
    other = files.folder / "other.onnx"
    if not other.exists():
        folded = files.model.model
        for parameter in folded.head.parameters():
            parameter.data = 1 - 2 * parameter.data
        deployment.export_onnx(
            folded, other, input_size=(3, 160, 160), graph_input=deployment.graph_input()
        )
    return cpu_runtimes.openvino.convert(other, path, files.batch)


def test_ratios_are_those_of_a_round():
    rates = {RIVAL: {1: [10.0, 5.0, 10.0]}, "Other": {1: [14.0, 6.0, 15.0]}}
    found = Results(deployment.Subject("ViT", SHALLOW_VIT, 1e9), rates)
    rows = found.rows((1,))
    assert (rows[1]["1"], rows[1]["1, ratio"]) == ("14", "1.40")
    assert rows[2]["1, ratio"] == "1.3: met"
