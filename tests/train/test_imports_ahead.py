"""Modules are imported by a thread, and the interval of the interpreter is as before."""

import sys

from fastadapt.train.imports_ahead import import_ahead


def test_modules_are_loaded_by_a_thread(tmp_path, monkeypatch):
    (tmp_path / "slow_to_load.py").write_text("import threading\nby = threading.current_thread()")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sys.getswitchinterval()
    thread = import_ahead(["not_there_at_all", "slow_to_load"])
    assert thread is not None
    thread.join()
    assert sys.modules["slow_to_load"].by is thread
    assert sys.getswitchinterval() == before
    assert import_ahead(["slow_to_load"]) is None
    del sys.modules["slow_to_load"]
