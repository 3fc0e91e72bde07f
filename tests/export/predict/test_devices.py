"""Several devices write the file of one; what a killed process leaves, the others do."""

import errno
import os
import signal
import socket
from multiprocessing.connection import Connection

import pytest

import fastadapt as fa
from fastadapt.export.predict import device_worker, devices, job, part_maker
from fastadapt.export.predict.settings import PredictSettings, WorkSettings
from fastadapt.export.predict.sources import Item
from tests.helpers.command import command


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(part_maker, "PART", 3)


def settings(made, out, **work):
    given = WorkSettings(images=(str(made / "images"),), out=out, batch=3, quiet=True, **work)
    return PredictSettings(model=str(made / "bundle")), given


def test_two_devices_and_one_write_the_same(made, tmp_path, monkeypatch, small_parts, capsys):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert job.predict_images(*settings(made, one, workers=1)).images == 24
    # One of the two processes is killed after its first batch.
    pools, real = [], devices.DevicePool.run

    def run(pool, todo, advance):
        pools.append(pool)
        killed = pool.pids[0]

        def stop_at(count):
            if killed in pool.pids:
                os.kill(killed, signal.SIGKILL)
            advance(count)

        real(pool, todo, stop_at)

    monkeypatch.setattr(devices.DevicePool, "run", run)
    summary = job.predict_images(*settings(made, two, devices=("cpu", "cpu"), workers=2))
    assert (summary.images, summary.computed) == (24, 24)
    assert two.read_bytes() == one.read_bytes()
    said = capsys.readouterr().err
    assert said == "the process for cpu ended by signal 9; the others do its parts\n"

    # Without another process it is an error, and one device goes on from what is finished.
    two.unlink()
    with pytest.raises(fa.InputError, match=r"signal 9, and no other is left.*resume=True"):
        job.predict_images(*settings(made, two, devices=("cpu",), workers=1))
    # Those with a record, which is written last: the kill may come between the two files.
    kept = {path.name for path in (tmp_path / "two.csv.parts").glob("part-*.json")}
    summary = job.predict_images(*settings(made, two, workers=1, resume=True))
    assert summary.computed == 24 - 3 * len(kept)
    assert two.read_bytes() == one.read_bytes()


def test_parts_that_are_finished_out_of_order_are_kept(made, tmp_path, small_parts):
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    job.predict_images(*settings(made, whole, workers=1))
    stopped = job.Job.run

    def keep_some(self):
        self.parts.join = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        return stopped(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job.Job, "run", keep_some)
        job.predict_images(*settings(made, out, workers=1))
    for number in (1, 2, 5):
        for path in (tmp_path / "out.csv.parts").glob(f"part-{number:06}*"):
            path.unlink()
    summary = job.predict_images(*settings(made, out, workers=1, resume=True))
    assert summary.computed == 9
    assert out.read_bytes() == whole.read_bytes()


def test_one_device_or_several(made, tmp_path, monkeypatch, capsys):
    args = ("predict", made / "bundle", made / "images", "--out", tmp_path / "o.csv")
    assert command(monkeypatch, *args, "--devices", "cpu", "--device", "cpu") == 1
    assert "--device is one device and --devices are several" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line(monkeypatch):
    def serve(connection):
        raise OSError(errno.ENOSPC, "No space left on device", "out.csv.parts/part-000002.csv")

    monkeypatch.setattr(device_worker, "_serve", serve)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ours, theirs = socket.socketpair()
    device_worker.main(theirs.detach())
    pool = object.__new__(devices.DevicePool)
    pool._running = [devices._Process("cpu", None, Connection(ours.detach()))]
    pool._size, pool._ahead = 3, 0
    with pytest.raises(fa.InputError, match=r"part-000002\.csv: No space.*; finished parts are"):
        pool.run([(0, [Item("a.png")])], lambda count: None)
