from types import SimpleNamespace

from fastadapt.export import runtime


def test_cores_are_those_that_may_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    cores = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    limit = "max 100000"

    def fake(path):
        if path.endswith("cpu.max"):
            return SimpleNamespace(read_text=lambda: limit)
        cpu = int(path.split("/cpu/cpu")[1].split("/")[0])
        return SimpleNamespace(is_file=lambda: True, read_text=lambda: cores[cpu])

    monkeypatch.setattr(runtime, "Path", fake)
    assert runtime.usable_cores() == 2
    limit = "100000 100000"
    assert runtime.usable_cores() == 1
