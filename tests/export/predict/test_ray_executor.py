"""Ray Data on this machine, for real: two workers, of which one is killed in the middle."""

import functools
import os
import signal
import socket
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
from PIL import Image

import fastadapt as fa
from fastadapt.export.predict import job, part_maker, ray_executor
from fastadapt.export.predict.request import Request
from fastadapt.export.predict.settings import PredictSettings, WorkSettings
from tests.helpers.command import command

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")


def workers():
    """Find the processes of Ray's that hold the model, below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::MapWorker") or "MapWorker" in process.cmdline()[0]:
                found.append(process.pid)
        except (psutil.Error, IndexError):
            continue
    return found


def test_a_killed_worker_changes_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(part_maker, "PART", 6)
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    odd = [str(bad), str(tmp_path / "pages.tif")]
    paths = [*sorted(map(str, (made / "images").rglob("*.png")))[1:], *odd] * 20
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))

    def settings(name, **more):
        given = WorkSettings(
            images=(str(tmp_path / "list.txt"),),
            out=tmp_path / name,
            batch=6,
            workers=1,
            quiet=True,
            **more,
        )
        return PredictSettings(model=str(made / "bundle"), logits=True), given

    # Ray counts GPUs and asks for none: it gives workers with a GPU other options.
    monkeypatch.setattr(ray, "init", functools.partial(ray.init, num_gpus=2))
    killed, real = [], ray_executor.RayPool.run

    def run(pool, todo, advance):
        def kill_one(images):
            if not killed:
                killed.extend(workers()[:1])
                os.kill(killed[0], signal.SIGKILL)
            advance(images)

        real(pool, todo, kill_one)

    monkeypatch.setattr(ray_executor.RayPool, "run", run)
    found = job.predict_images(*settings("ray.csv", executor="ray", ray_workers=2))
    assert killed and (found.images, found.computed, found.unreadable) == (500, 500, 20)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    want = job.predict_images(*settings("local.csv"))
    assert found.out.read_bytes() == want.out.read_bytes()
    assert found.notes == want.notes
    assert any("20 of 500 images lose pages" in note for note in found.notes), found.notes
    assert found.unreadable_file.read_bytes() == want.unreadable_file.read_bytes()


def test_what_ray_does_not_take(made, tmp_path, monkeypatch, capsys):
    args = ("predict", made / "bundle", made / "images", "--out", tmp_path / "o.csv")
    for more, says in {
        ("--executor", "ray", "--devices", "cpu"): "leave out --device and --devices",
        ("--ray-address", "auto"): "--ray-address and --ray-workers are for --executor ray",
    }.items():
        assert command(monkeypatch, *args, *more) == 1
        assert says in capsys.readouterr().err


def test_without_ray(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    work = WorkSettings(images=(str(made / "images"),), out=tmp_path / "o.csv", executor="ray")
    with pytest.raises(fa.InputError, match=r"needs Ray Data: pip install"):
        job.predict_images(PredictSettings(model=str(made / "bundle")), work)


def test_a_worker_that_dies_while_it_loads_is_named(made, tmp_path, monkeypatch):
    def dies(_):
        raise ray.exceptions.ActorDiedError()

    # Without a cluster, which takes seconds to start.
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "remote", lambda **_: lambda kind: SimpleNamespace(remote=Mock()))
    monkeypatch.setattr(ray, "get", dies)
    work = WorkSettings(images=(str(made / "images"),), out=tmp_path / "o.csv", executor="ray")
    with pytest.raises(fa.InputError, match=r"worker ended while it loaded .*bundle"):
        ray_executor.RayPool(Request(PredictSettings(model=str(made / "bundle"))), work)


def test_a_cluster_that_does_not_answer_is_named():
    for address in (None, "auto", "local", "ray://name-only"):
        ray_executor.check_address(address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        ray_executor.check_address(here)
        ray_executor.check_address(f"ray://{here}")
    for address in (here, f"ray://{here}", "127.0.0.1:99999999", "a..b:1"):
        with pytest.raises(fa.InputError, match=r"ray_address is .* where nothing answers"):
            ray_executor.check_address(address)
