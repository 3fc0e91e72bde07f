"""Processes that decode: right pixels, clear problems, nothing left over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastadapt.data.decode_pool import DecodePool, Reading
from fastadapt.data.intensity import IntensitySetting
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError

GEOMETRY = Geometry(8, 8, "bilinear")
READING = Reading(GEOMETRY)


def looks(paths):
    return [(path, IntensitySetting.parse("dtype"), False) for path in paths]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = [folder / f"{i:03}.png" for i in range(70)]
    for path in made:
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    (folder / "bad.png").write_text("no image")
    return [str(path) for path in made]


def expected(path):
    with Image.open(path) as image:
        return np.asarray(GEOMETRY.apply(image.convert("RGB")))


def as_images(region, count):
    return np.frombuffer(region.bytes, np.uint8).reshape(count, 8, 8, 3)


@pytest.mark.parametrize("keep", [0, 40_000, 1 << 30])
def test_images_are_looked_at_and_stored(paths, keep):
    bad = paths[0].replace("000", "bad")
    with DecodePool(2) as pool:
        seen = []
        facts = pool.look(looks([*paths, bad, paths[0] + "x"]), keep).wait(seen.append)
        assert [i for i, fact in enumerate(facts) if fact.problem] == [70, 71]
        assert "bad.png cannot be read as an image" in facts[70].problem
        assert "does not exist" in facts[71].problem
        assert sum(seen) == 72
        first, second = pool.memory(70, READING.slot), pool.memory(1, READING.slot)
        assert pool.store(paths, READING, first).wait() == [None] * 70
        assert pool.store(paths[5:6], READING, second).wait() == [None]
        (answer,) = pool.store([bad], READING, second).wait()
        assert "bad.png cannot be read as an image" in answer
        for images, names in ((as_images(first, 70), paths), (as_images(second, 1), paths[5:6])):
            for image, path in zip(images, names, strict=True):
                assert np.array_equal(image, expected(path))
        images = as_images(first, 70)
    assert np.array_equal(images[3], expected(paths[3]))  # the memory outlives the processes


def test_values_are_scaled_as_the_range_says(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 2048, np.uint16)).save(path)
    for setting, value in (((0, 4095), 128), (None, 8)):
        for keep in (0, 1 << 20):
            with DecodePool(1) as pool:
                pool.look(looks([str(path)]), keep).wait()
                region = pool.memory(1, READING.slot)
                assert pool.store([str(path)], Reading(GEOMETRY, setting), region).wait() == [None]
                assert (as_images(region, 1) == value).all()


def test_a_stream_gives_every_batch_in_order_from_a_small_ring(paths):
    with DecodePool(3) as pool:
        region = pool.memory(3 * 7, READING.slot)
        images = as_images(region, 21)
        batches = [list(range(i, min(i + 7, 70))) for i in range(0, 70, 7)]
        requests = (
            [(number % 3 * 7 + i, paths[row]) for i, row in enumerate(rows)]
            for number, rows in enumerate(batches)
        )
        count = 0
        for number, problems in enumerate(pool.stream(requests, READING, region, 3)):
            assert not any(problems)
            for i, row in enumerate(batches[number]):
                assert np.array_equal(images[number % 3 * 7 + i], expected(paths[row]))
                count += 1
        assert count == 70


def test_a_process_that_dies_is_named(paths):
    with DecodePool(1) as pool:
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InputError, match=r"decodes images ended by signal 9.*fewer workers"):
            pool.look(looks(paths)).wait()


def test_processes_end_with_the_one_that_started_them(paths, tmp_path):
    program = (
        "import sys, os, signal; from fastadapt.data.decode_pool import DecodePool\n"
        "from fastadapt.data.intensity import IntensitySetting\n"
        "dtype = IntensitySetting.parse('dtype'); pool = DecodePool(2)\n"
        "pool.look([(path, dtype, False) for path in sys.argv[1:]]).wait()\n"
        "print(*pool.pids, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, *paths[:3]], stdout=subprocess.PIPE)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pids} still run")


def test_decoding_imports_no_torch(paths):
    program = (
        "import sys; import fastadapt.data.decode_worker, fastadapt.data.scan\n"
        "print([name for name in ('torch', 'timm', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == "[]"
