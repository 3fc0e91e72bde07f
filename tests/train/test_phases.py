"""Seconds are counted once, in the innermost phase."""

from fastadapt.train import phases as module
from fastadapt.train.phases import PHASES, Phases, process_age


def test_time_within_is_taken_out_of_the_phase_around(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    phases = Phases(age=2.0)
    now[0] += 1
    with phases("stage1"):
        now[0] += 4
        with phases("saving"):
            now[0] += 8
        now[0] += 16
    assert phases.to_dict() == {
        **dict.fromkeys(PHASES, 0.0),
        "start": 3.0,
        "stage1": 20.0,
        "saving": 8.0,
        "total": 31.0,
    }


def test_a_process_has_an_age():
    assert process_age() >= 0
