"""Share settings with every test: few threads, no network, seeds, and the package to be tested."""

import contextlib
import functools
import gc
import importlib
import os
import signal
import sys
import tempfile
from importlib.machinery import PathFinder
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Which bundles were made here: not in the home of whoever runs the tests.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="fastadapt-state-")

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = str(Path(__file__).parents[1])


def prefer_installed_package() -> None:
    """Test the installed wheel where there is one, in this process and in those that tests start.

    The sources' folder ``fastadapt`` lacks what setuptools maps into it, so it must not come first.
    A clone is installed as editable, by a finder of its own: there nothing is changed.
    """
    others = [path for path in sys.path if Path(path or ".").resolve() != Path(ROOT)]
    spec = PathFinder.find_spec("fastadapt", others)
    if spec is None or spec.origin is None:
        return
    sys.path[:] = [*others, ROOT]
    installed = str(Path(spec.origin).parents[1])
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([installed, ROOT])
    importlib.import_module("fastadapt")  # before pytest puts the root in front again


prefer_installed_package()
torch.set_num_threads(1)
# Speeds that exports measure prove nothing here: three calls each.
importlib.import_module("fastadapt.export.speed").SECONDS = 0.0
# A busy machine is no failure.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Started in the background, a shell has the tests ignore Ctrl-C; some send it to themselves and to
# processes of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Every new tensor starts as NaN: what a kernel leaves unwritten shows."""

    def poison(create):
        def created(*args, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return created

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def stand_in(monkeypatch):
    """CUDA graphs that call the step again, so that a CPU shows the logic around them."""
    from tests.helpers.cuda_graphs import StandIn

    return StandIn().install(monkeypatch)


@pytest.fixture
def exact(monkeypatch):
    """No TF32 and deterministic convolutions, so that results can be compared bit for bit."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def brief_search(monkeypatch):
    """Weights that no model of timm's has: let a fifth of a second, not ten, find that none has."""
    from fastadapt import weights_match

    brief = functools.partial(weights_match.suggest_timm_model, seconds=0.2)
    monkeypatch.setattr(weights_match, "suggest_timm_model", brief)


def pytest_collection_finish():
    """Leave what all tests share out of every search for garbage, of half a second each."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that forks in a fresh process: forks cannot use autograd once its threads run."""
    if pyfuncitem.get_closest_marker("forks") is None or "TESTS_FORK_HERE" in os.environ:
        return None
    from tests.helpers import warm_process

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = {**kept, "TESTS_FORK_HERE": "1"}
    with (
        contextlib.chdir(pyfuncitem.config.rootpath),
        tempfile.NamedTemporaryFile("r", suffix=".log") as log,
    ):
        done = warm_process.run(
            command, stdout=log, stderr=log, env=environment, check=False, timeout=500
        )
        assert done.returncode == 0, log.read()[-10_000:]
    return True
