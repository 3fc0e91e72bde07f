"""A bundle as a function of images: the same answers as in training."""

import itertools
import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fastadapt as fa
from fastadapt.data.decode import load_image
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import load
from fastadapt.export import predictor as predictor_step
from fastadapt.export.artefact import Artefact
from fastadapt.export.runtimes import RuntimeUnavailable
from fastadapt.files import read_json
from tests.helpers.bundles import reseal
from tests.helpers.imagesets import CLASSES


class TestSameAsTraining:
    @pytest.mark.parametrize("name", ["uint8", "float", "resize"])
    def test_every_picture_gets_the_trained_models_label(self, tuned_bundles, name):
        folder, model = tuned_bundles
        paths = sorted((folder / "pictures").iterdir())
        preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg, input_size=(3, 32, 32))
        pixels = torch.stack([preprocess.read(path) for path in paths])
        with torch.no_grad():
            logits = model(preprocess.normalize(pixels)).numpy()
        found = load(folder / name)(paths)
        assert found.labels == [CLASSES[i] for i in logits.argmax(1)]
        assert len(set(found.labels)) > 1
        tolerance = 0.05 if name == "resize" else 1e-4
        np.testing.assert_allclose(found.logits, logits, atol=tolerance * logits.std())
        np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-6)


@pytest.fixture(scope="module")
def predict(tuned_bundles):
    return fa.export.load(tuned_bundles[0] / "uint8")


class TestImages:
    def test_every_way_to_give_an_image(self, predict, tuned_bundles):
        path = tuned_bundles[0] / "pictures" / "rgb0.png"
        image = load_image(path)
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
        want = predict(path).logits
        assert want.shape == (1, 3)
        for given in (str(path), image, array, tensor, [path], [image, array], (tensor,)):
            got = predict(given).logits
            np.testing.assert_allclose(got, np.repeat(want, len(got), 0), atol=1e-5)
        for given in (array[None].repeat(2, 0), torch.stack([tensor] * 3)):
            assert len(predict(given)) == len(given)

    def test_more_than_a_batch(self, predict, tuned_bundles):
        path = tuned_bundles[0] / "pictures" / "rgb0.png"
        found = predict([path] * 70)
        np.testing.assert_allclose(found.logits, found.logits[:1].repeat(70, 0), atol=1e-5)

    def test_sizes_may_differ_where_the_graph_resizes(self, tuned_bundles):
        predict = load(tuned_bundles[0] / "resize")
        paths = sorted((tuned_bundles[0] / "pictures").glob("rgb*.png"))
        together = predict(paths[::-1]).logits
        for path, row in zip(paths[::-1], together, strict=True):
            np.testing.assert_allclose(predict(path).logits[0], row, atol=1e-5)

    @pytest.mark.parametrize(
        "image,says",
        [
            (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\]; expected a uint8"),
            (np.zeros((8, 8), np.uint8), r"uint8 \[8, 8\]; expected"),
            (torch.zeros(8, 8, 3, dtype=torch.uint8), r"tensor \[3, H, W\]"),
            (3.0, "an image is a float"),
            ([], "no images"),
            ("gone.png", "gone.png does not exist"),
        ],
    )
    def test_what_is_no_image(self, predict, image, says):
        with pytest.raises(fa.InputError, match=says):
            predict(image)


class TestChoice:
    @pytest.fixture
    def bundle(self, tuned_bundles, tmp_path):
        """A bundle with a second file that runs, faster where the bundle was tuned_bundles."""
        shutil.copytree(tuned_bundles[0] / "uint8", tmp_path, dirs_exist_ok=True)
        fast = (tmp_path / "model.onnx").read_bytes()
        (tmp_path / "fast.onnx").write_bytes(fast)
        speeds = {"model.onnx": 10.0, "fast.onnx": 20.0}
        artefacts = [
            Artefact(
                "onnx",
                name,
                "fp32",
                "verified",
                speed={"ONNX Runtime, CPU": {"1": speed}, "ONNX Runtime, CUDA": {"1": 1 / speed}},
                files=(name,),
                details={"batch": {"min": 4, "opt": 4, "max": 4}},
            ).to_dict()
            for name, speed in speeds.items()
        ]
        reseal(tmp_path, artefacts=artefacts)
        return tmp_path

    def test_the_fastest_that_runs_here(self, bundle, tuned_bundles, monkeypatch):
        assert load(bundle, device="cpu").artefact.path == "fast.onnx"
        assert load(bundle, "model.onnx", device="cpu").artefact.path == "model.onnx"

        def only_one(path, *args, **kwargs):
            if path.name == "fast.onnx":
                raise RuntimeUnavailable("not here")
            return real(path, *args, **kwargs)

        real = predictor_step.load_runtime
        monkeypatch.setattr(predictor_step, "load_runtime", only_one)
        assert load(bundle, device="cpu").artefact.path == "model.onnx"

    def test_engines_of_fixed_batch_get_full_batches(self, bundle, tuned_bundles):
        path = tuned_bundles[0] / "pictures" / "rgb0.png"
        predict, plain = load(bundle, device="cpu"), load(tuned_bundles[0] / "uint8")
        sizes = []
        real = predict.runtime.run_arrays
        predict.runtime.run_arrays = lambda x: (sizes.append(len(x)), real(x))[1]
        np.testing.assert_allclose(predict([path] * 6).logits, plain([path] * 6).logits, atol=1e-5)
        assert sizes == [4, 4]

    def test_unverified_files_are_not_chosen(self, bundle):
        manifest = read_json(bundle / "manifest.json")
        for row in manifest["artefacts"]:
            row["status"] = "unverified"
        reseal(bundle, artefacts=manifest["artefacts"])
        with pytest.raises(fa.InputError, match=r"nothing in .* was verified"):
            load(bundle)

    def test_damage_and_unknown_files(self, bundle):
        with pytest.raises(fa.InputError, match=r"no model\.plan to run; it has model\.onnx, fast"):
            load(bundle, "model.plan")
        (bundle / "labels.txt").write_text("other")
        with pytest.raises(fa.InputError, match=r"labels\.txt has 5 bytes"):
            load(bundle)
        assert load(bundle, check=False, device="cpu").classes == CLASSES


class TestMany:
    @pytest.mark.parametrize("name", ["uint8", "float", "resize"])
    def test_iter_gives_what_a_call_gives(self, tuned_bundles, name, tmp_path):
        predict = load(tuned_bundles[0] / name)
        paths = sorted((tuned_bundles[0] / "pictures").iterdir())
        (tmp_path / "bad.png").write_text("no image")
        given = [*paths[:3], tmp_path / "bad.png", *paths[3:]]
        found = list(predict.iter(iter(given), batch=4, workers=2))
        assert [one.path for one in found] == given
        bad = found.pop(3)
        assert "bad.png cannot be read" in bad.problem and bad.label == "" and bad.logits is None
        want = predict(paths)
        assert [one.label for one in found] == want.labels
        for one, logits, probabilities in zip(found, want.logits, want.probabilities, strict=True):
            np.testing.assert_allclose(one.logits, logits, atol=1e-4)
            np.testing.assert_allclose(one.probabilities, probabilities, atol=1e-4)

    def test_iter_takes_paths_only_as_needed(self, predict, tuned_bundles):
        path = str(tuned_bundles[0] / "pictures" / "rgb0.png")
        taken = []
        endless = (taken.append(1) or path for _ in itertools.count())
        found = predict.iter(endless, batch=2, workers=1)
        assert next(found).label and next(found).label
        found.close()
        assert len(taken) <= 12
        assert list(predict.iter([])) == []
        with pytest.raises(fa.InputError, match="batch is 0"):
            next(predict.iter([path], batch=0))
        for single in (path, Path(path)):
            with pytest.raises(fa.InputError, match="a single path; expected several"):
                next(predict.iter(single))


class TestProcesses:
    def test_a_pickle_loads_the_bundle_again(self, predict, tuned_bundles):
        path = tuned_bundles[0] / "pictures" / "rgb0.png"
        again = pickle.loads(pickle.dumps(predict))
        assert again.artefact == predict.artefact and again.runtime is not predict.runtime
        np.testing.assert_array_equal(again(path).logits, predict(path).logits)

    def test_a_started_process_predicts(self, predict, tuned_bundles):
        paths = [str(tuned_bundles[0] / "pictures" / "rgb0.png")] * 2
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            ((label,),) = pool.map(_label_of, [(predict, paths[:1])])
        assert label == predict(paths[0]).labels[0]

    def test_a_forked_process_is_told(self, predict, tuned_bundles, monkeypatch):
        monkeypatch.setattr(predictor_step.os, "getpid", lambda: -1)
        with pytest.raises(fa.InputError, match="loaded before the process forked"):
            predict(tuned_bundles[0] / "pictures" / "rgb0.png")

    def test_several_threads(self, predict, tuned_bundles):
        paths = sorted((tuned_bundles[0] / "pictures").glob("*.png"))
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(predict, paths * 3))
        for path, one in zip(paths * 3, found, strict=True):
            np.testing.assert_allclose(one.logits, predict(path).logits, atol=1e-5)


def _label_of(job):
    predict, paths = job
    return predict(paths).labels
