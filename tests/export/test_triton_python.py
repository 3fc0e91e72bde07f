"""A bundle in Triton's Python backend: the module alone, and in a real server where there is one.

The server is in the wheel of nvidia-pytriton, which wants an older NumPy, so that it has an
environment of its own: `python -m venv triton`, `triton/bin/pip install nvidia-pytriton`, and its
folder in the environment variable FASTADAPT_TRITON.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from fastadapt.export import load, write_repository
from fastadapt.files import read_json, read_tensors
from tests.export.test_triton_server import model_config

SERVER = os.environ.get("FASTADAPT_TRITON")


@pytest.fixture(scope="module")
def repository(tuned_bundles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_repository(tuned_bundles[0] / "uint8", folder, backend="python")
    return folder


def test_the_repository(tuned_bundles, repository):
    model = repository / "uint8"
    config, _ = model_config((model / "config.pbtxt").read_text())
    assert (config.backend, config.platform, config.max_batch_size) == ("python", "", 32)
    assert config.parameters["trust"].string_value == "false"
    assert read_json(model / "1/bundle/manifest.json") == read_json(
        tuned_bundles[0] / "uint8/manifest.json"
    )
    # The same bundle again becomes the next version.
    write_repository(tuned_bundles[0] / "uint8", repository, backend="python")
    assert (model / "2/model.py").is_file() and (model / "2/bundle/model.onnx").is_file()
    shutil.rmtree(model / "2")


class Tensor:
    def __init__(self, name, values):
        self.name, self.values = name, values

    def as_numpy(self):
        return self.values


def test_the_module_answers_requests_that_were_batched(repository, monkeypatch):
    backend = types.SimpleNamespace(
        Tensor=Tensor,
        TritonError=lambda message: message,
        InferenceResponse=lambda tensors=(), error=None: (list(tensors), error),
        get_input_tensor_by_name=lambda request, name: Tensor(name, request[name]),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    names: dict = {}
    exec((repository / "uint8/1/model.py").read_text(), names)
    model = names["TritonPythonModel"]()
    config = {
        "input": [{"name": "images"}],
        "output": [{"name": "logits"}],
        "parameters": {"trust": {"string_value": "false"}},
    }
    where = {"model_repository": str(repository / "uint8"), "model_version": "1"}
    kind = {"model_instance_kind": "CPU", "model_instance_device_id": "0"}
    model.initialize({"model_config": json.dumps(config), **where, **kind})
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    want = load(repository / "uint8/1/bundle").run(images)
    answers = model.execute(
        [{"images": images[:1]}, {"images": images[1:4]}, {"images": images[4:]}]
    )
    found = np.concatenate([tensors[0].values for tensors, error in answers if error is None])
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert [len(tensors[0].values) for tensors, _ in answers] == [1, 3, 2]
    good, bad = model.execute([{"images": images[:2]}, {"images": images[:1, :16]}])
    assert good[1] is None and "fails at batch size 1" in bad[1]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(environment, repository, log, port):
    """Start the server of an environment; the models' Python is that of the tests."""
    (package,) = environment.glob("lib/python3*/site-packages/pytriton/tritonserver")
    version = "{}.{}".format(*sys.version_info)
    backends = log.parent / "backends"
    shutil.copytree(package / "backends", backends)
    # The libraries beside the package are found relative to where the files were.
    libraries = package.parents[1] / "nvidia_pytriton.libs"
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python" / stub.name)
    (backends / "python" / stub.name).chmod(0o755)
    command = [package / "bin/tritonserver", "--model-repository", repository]
    command += ["--backend-directory", backends, "--http-port", port, "--http-address", "127.0.0.1"]
    command += ["--allow-grpc", "false", "--allow-metrics", "false"]
    # Its own NumPy comes first: the back end reads and writes arrays of NumPy 1 alone.
    paths = os.pathsep.join([str(package.parents[1]), *filter(None, sys.path)])
    more = {"PYTHONPATH": paths, "LD_LIBRARY_PATH": str(libraries), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, env=os.environ | more
        )


CLIENT = """
import sys, numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
port, given, out = sys.argv[1:]
client, images, found = InferenceServerClient("127.0.0.1:" + port), np.load(given), {}
for count in (1, 3, len(images)):
    value = InferInput("images", [count, *images.shape[1:]], "UINT8")
    value.set_data_from_numpy(images[:count])
    wanted = [InferRequestedOutput("logits")]
    found[str(count)] = client.infer("uint8", [value], outputs=wanted).as_numpy("logits")
np.savez(out, **found)
"""


@pytest.mark.skipif(not SERVER, reason="FASTADAPT_TRITON names no environment with a server")
def test_a_real_server_gives_the_golden_outputs(tuned_bundles, repository, tmp_path):
    environment = Path(SERVER).absolute()
    port, log = free_port(), tmp_path / "log"
    process = start(environment, repository, log, port)
    try:
        wait_for(port, process, log)
        tensors, _ = read_tensors(tuned_bundles[0] / "uint8/golden.safetensors")
        images, want = np.moveaxis(tensors["images"].numpy(), 1, -1), tensors["expected"].numpy()
        np.save(tmp_path / "images.npy", np.ascontiguousarray(images))
        files = (tmp_path / "images.npy", tmp_path / "found.npz")
        client = [environment / "bin/python", "-c", CLIENT, port, *files]
        subprocess.run(list(map(str, client)), check=True)
        with np.load(files[1]) as found:
            assert set(found) == {"1", "3", str(len(images))}
            for count, logits in found.items():
                np.testing.assert_allclose(logits, want[: int(count)], atol=1e-4)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def wait_for(port, process, log):
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready").close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())
