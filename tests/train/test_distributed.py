"""Training in several processes on CPUs: the weights of one, and one line whatever ends it."""

import signal
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import fastadapt as fa
from fastadapt import cli, processes
from fastadapt.data import images, scan
from fastadapt.errors import InputError
from fastadapt.train.config import TrainConfig
from fastadapt.train.devices import check_batch_sizes, device_of_process
from fastadapt.train.loop import Trainer
from fastadapt.train.run import train
from tests.helpers.imagesets import make_folders
from tests.helpers.processes import run_processes
from tests.helpers.shallow_models import SHALLOW_VIT

pytestmark = pytest.mark.forks

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=1.0, input_size=(3, 32, 32))
# Seven images of a batch are four and three; the last batch has two of 16 images.
CONFIG = TrainConfig(
    stages=2, epochs=2, epochs2=1, lr=1e-3, lr2=1e-4, batch_size=7, val_fraction=0.25, probe=False
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("several") / "data", 7)


def run(data, out, config=CONFIG, **options):
    return train(
        data, out, SHALLOW_VIT, config, ADAPT, pretrained=False, workers=1, save_every=0, **options
    )


def difference(one, other):
    """The relative difference of all weights of two runs."""
    a, b = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    a, b = (torch.cat([t.double().flatten() for t in tensors.values()]) for tensors in (a, b))
    return float((a - b).norm() / a.norm())


def interrupted(data, out, epochs):
    """Train until Ctrl-C reaches one process, which is not the first."""
    complete = Trainer._complete_epoch

    def then_stop(trainer, row, optimizer):
        complete(trainer, row, optimizer)
        if len(trainer.state.history) == epochs and not trainer.processes.first:
            signal.raise_signal(signal.SIGINT)

    Trainer._complete_epoch = then_stop
    processes.HESITATION = 0.0
    try:
        run(data, out)
    except KeyboardInterrupt:
        raise SystemExit(3) from None


def test_two_processes_train_the_weights_of_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "INLINE", 1)  # decoded in shares, by processes
    monkeypatch.setattr(scan, "INLINE", 1)
    one, two, broken = (tmp_path / name for name in ("one", "two", "broken"))
    run(data, one)
    assert run_processes(2, partial(run, data, two)) == [0, 0]
    assert difference(one, two) < 1e-6
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in two.iterdir()} == names
    assert (two / "metrics.jsonl").read_text().count("\n") == 3
    # Stopped with two processes, resumed with one.
    assert run_processes(2, partial(interrupted, data, broken, 1)) == [3, 130]
    run(data, broken, resume=True)
    assert difference(one, broken) < 1e-6


def test_uncached_stages_of_more_processes_than_images_in_the_last_batch(data, tmp_path):
    config = replace(CONFIG, cache=False, augment="dihedral", epochs=1, stages=1)
    run(data, tmp_path / "one", config)
    assert run_processes(3, partial(run, data, tmp_path / "three", config)) == [0, 0, 0]
    assert difference(tmp_path / "one", tmp_path / "three") < 1e-6


def command(data, out, *options):
    """The command line, as each process of torchrun runs it."""
    import sys

    processes.HESITATION = 0.5
    sys.argv = ["fastadapt", "train", str(data), "--backbone", "test_vit", "--out", str(out)]
    sys.argv += ["--no-pretrained", "--image-size", "32", "--epochs", "2", "--quiet", *options]
    cli.main()


def test_an_error_is_one_line(data, tmp_path, capfd):
    one_left = partial(command, data, tmp_path / "run", "--batch-size", "1")
    assert run_processes(2, one_left) == [1, 1]
    assert capfd.readouterr().err == (
        "fastadapt: --batch-size is 1, and a batch is split over 2 processes: give --batch-size 2 "
        "or more, or start fewer processes\n"
    )


def test_a_process_that_is_gone_ends_all_with_one_line(data, tmp_path, capfd):
    def call():
        train_epoch = Trainer._train_epoch

        def die(trainer, epoch, *arguments):
            if epoch == 2 and not trainer.processes.first:
                time.sleep(0.1)
                signal.raise_signal(signal.SIGKILL)
            return train_epoch(trainer, epoch, *arguments)

        Trainer._train_epoch = die
        command(data, tmp_path / "run")

    assert run_processes(2, call) == [1, -signal.SIGKILL]
    assert capfd.readouterr().err == (
        "fastadapt: another process of this training has ended: continue with --resume\n"
    )
    assert (tmp_path / "run" / "state.safetensors").is_file()


def test_devices_and_batches_of_processes(monkeypatch):
    place = processes.Place(3, 4, 1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_process("auto", place) == "cuda:1"
    assert device_of_process("cpu", place) == "cpu"
    with pytest.raises(InputError, match="each on a GPU of its own"):
        device_of_process("cuda:1", place)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--nproc-per-node 1"):
        device_of_process("auto", place)
    with pytest.raises(InputError, match="batch_size2 is 3"):
        check_batch_sizes(replace(CONFIG, batch_size2=3), place)
