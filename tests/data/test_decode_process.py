"""Whatever ends a pass, or runs beside it, the next one gets the answers to what it asked."""

import linecache
import multiprocessing.connection
import os
import signal
import sys
from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastadapt.data import decode_process
from fastadapt.data.decode_pool import DecodePool, Reading
from fastadapt.data.decode_ring import DecodeRing
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError

READING = Reading(Geometry(4, 4, "bilinear"))
BATCH = 2
FILES = {decode_process.__file__, multiprocessing.connection.__file__}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Give images of which each is of one value, its place."""
    folder = tmp_path_factory.mktemp("values")
    made = [folder / f"{value}.png" for value in range(12)]
    for value, path in enumerate(made):
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)
    return [str(path) for path in made]


@pytest.fixture(scope="module")
def ring():
    with DecodePool(1) as pool:
        yield DecodeRing(pool, READING, BATCH)


def values_of(ring, paths):
    """Return a value of each image, pass by pass."""
    batches = (paths[start : start + BATCH] for start in range(0, len(paths), BATCH))
    return [int(slot[0]) for batch in ring.batches(batches) for slot in batch.slots]


def interrupt_at(count):
    """Make a trace function that raises KeyboardInterrupt at a line of what sends and receives."""
    left = count

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in FILES:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # Between these and what they begin or end, Python looks at no signal.
        if event == "line" and not line.startswith(("with ", "try:")):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    return trace


@settings(max_examples=5, deadline=None)
@given(count=st.integers(1, 400), order=st.permutations(range(12)))
def test_a_pass_after_ctrl_c_has_its_own_images(ring, paths, count, order):
    before = sys.gettrace()
    sys.settrace(interrupt_at(count))
    try:
        values_of(ring, paths)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    assert values_of(ring, [paths[i] for i in order]) == list(order)


def test_threads_share_processes(paths):
    found = {}

    def run(number, ring):
        found[number] = [values_of(ring, paths[number:]) for _ in range(8)]

    with DecodePool(2) as pool:
        rings = [DecodeRing(pool, READING, BATCH) for _ in range(4)]
        threads = [Thread(target=run, args=each) for each in enumerate(rings)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: [list(range(number, 12))] * 8 for number in range(4)}


def test_a_process_that_ended_is_started_again(paths):
    with DecodePool(2) as pool:
        ring = DecodeRing(pool, READING, BATCH)
        left = ring.batches([paths[:2]] * 9)
        next(left)
        os.kill(pool.pids[1], signal.SIGKILL)
        with pytest.raises(InputError, match="decodes images ended by signal 9"):
            list(left)
        assert values_of(ring, paths) == list(range(12))
    with pytest.raises(InputError, match="were closed"):
        values_of(ring, paths)


def test_large_batches_that_cannot_be_read_fill_no_pipe(tmp_path):
    names = [str(tmp_path / f"{'x' * 100}{i}.png") for i in range(2500)]
    with DecodePool(1) as pool:
        batches = DecodeRing(pool, READING, len(names)).batches([names] * 4)
        assert [sum("does not exist" in a for a in batch.answers) for batch in batches] == (
            [len(names)] * 4
        )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_does_not_take_answers(ring, paths):
    child = os.fork()
    if child == 0:
        try:
            values_of(ring, paths)
        except InputError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert values_of(ring, paths) == list(range(12))
