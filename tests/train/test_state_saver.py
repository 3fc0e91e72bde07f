"""States are written aside, whole, newest first; nothing offered is lost unless killed."""

import threading

import pytest

from fastadapt.train.run_folder import State
from fastadapt.train.state_saver import StateSaver


def test_each_state_is_written_at_once_if_asked_for():
    written = []
    saver = StateSaver(lambda state: written.append(state.epoch), every=0)
    for epoch in (1, 2, 3):
        saver.offer(State(epoch=epoch))
        assert written[-1] == epoch


def test_the_newest_is_written_in_the_end():
    written = []
    saver = StateSaver(lambda state: written.append(state.epoch), every=1e6)
    for epoch in (1, 2, 3):
        saver.offer(State(epoch=epoch))
    assert written == []
    saver.flush()
    saver.flush()
    assert written == [3]


def test_training_goes_on_while_a_state_is_written(monkeypatch):
    written, may_write, clock = [], threading.Event(), [0.0]
    monkeypatch.setattr("fastadapt.train.state_saver.time.monotonic", lambda: clock[0])

    def write(state):
        may_write.wait(30)
        written.append(state.epoch)

    saver = StateSaver(write, every=10)
    for epoch in (1, 2, 3):
        clock[0] += 11
        saver.offer(State(epoch=epoch))
    assert written == []  # the first is being written, the newest waits
    may_write.set()
    saver.flush()
    assert written == [1, 3]


def test_what_a_write_raised_comes_out():
    def full(state):
        raise OSError(28, "No space left on device")

    saver = StateSaver(full, every=1e-9)
    saver.offer(State(epoch=1))
    with pytest.raises(OSError, match="No space left"):
        saver.flush()


def test_a_finished_run_writes_nothing_more():
    written = []
    saver = StateSaver(lambda state: written.append(state.epoch), every=1e6)
    saver.offer(State(epoch=1))
    saver.drop()
    saver.flush()
    assert written == []
