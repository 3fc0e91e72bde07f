"""What computes the rows: a bundle, the model of a run, or a backbone by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.adapted_model import adapt
from fastadapt.backbones import UnknownModel
from fastadapt.checkpoint import CONFIG, backbone_fingerprint
from fastadapt.config import AdaptConfig
from fastadapt.data.decode_pool import Reading
from fastadapt.data.pixels import ValueRange
from fastadapt.data.preprocess import Preprocess
from fastadapt.decision import LIKELIEST, Decision
from fastadapt.errors import InputError
from fastadapt.files import sha256_file
from fastadapt.train.devices import parse_device
from fastadapt.train.fold_results import FOLDS
from fastadapt.train.request import REQUEST
from fastadapt.train.run_folder import meant_run

from ..bundle.manifest import MANIFEST
from ..bundle.trained import Trained, hash_run, load_run, read_run
from ..features import Features, WithFeatures, check_features
from ..fold import fold
from ..predictor import load
from ..tasks import Task, find_task


@dataclass(frozen=True)
class ImageModel:
    """A model as a function of prepared images.

    Attributes:
        run: from uint8 [images, H, W, 3] to fp32 [images, width].
        width: outputs for each image: classes, then features where both are asked for.
        classes: their names; empty for features.
        reading: how an image file becomes pixels; ``None`` where the graph resizes.
        value_range: of the pixels, for images of their own size.
        name: of what runs it, for people.
        identity: what the outputs depend on: hashes, and the runtime.
        decision: how probabilities become classes.
        tasks: of a bundle with several, whose outputs stand side by side; it then has no classes.
    """

    run: Callable[[np.ndarray], np.ndarray]
    width: int
    classes: tuple[str, ...]
    reading: Reading | None
    value_range: ValueRange | None
    name: str
    identity: dict[str, Any]
    decision: Decision = LIKELIEST
    tasks: tuple[Task, ...] = ()

    def of_task(self, name: str) -> ImageModel:
        """Return the model of one of several tasks.

        Raises:
            InputError: there is no such task.
        """
        task, run = find_task(self.tasks, name), self.run
        return replace(
            self,
            run=lambda pixels: np.ascontiguousarray(run(pixels)[:, task.columns]),
            width=len(task.classes),
            classes=task.classes,
            identity={**self.identity, "task": name},
            decision=task.decision,
            tasks=(),
        )


def open_classifier(
    path: str, *, device: str, trust: bool, embeddings: bool = False, task: str | None = None
) -> ImageModel:
    """Open a bundle or a run for predictions.

    Args:
        path: of its folder.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or, for runs, ``"cuda:1"``.
        trust: as for :func:`fastadapt.export.load`.
        embeddings: give the features before the head, too, after the classes.
        task: the one of several that is meant; all if ``None``.

    Raises:
        InputError: the folder is neither, cannot be loaded, has no classes, or lacks features or a
            task that are asked for.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        model = _of_bundle(folder, device, trust, "all" if embeddings else "classes")
    elif (folder / CONFIG).is_file() or (folder / FOLDS).is_file():
        trained = load_run(folder, read_run(folder))
        module, width = fold(trained.model), len(trained.labels)
        if embeddings:
            check_features(trained.model, path)
            module, width = _Both(module), width + trained.model.num_features
        model = _of_run(trained, module, width, device)
    else:
        raise _neither(folder)
    if task is not None:
        return model.of_task(task)
    if not model.classes and not model.tasks:
        raise InputError(f"{path} has no classes to predict: fastadapt embed writes its features")
    return model


def open_embedder(
    path: str, *, device: str, trust: bool, weights: str | None, image_size: int | None
) -> ImageModel:
    """Open a run, a backbone or a bundle without a head for features.

    Args:
        path: a folder, or timm's name of a backbone; what exists wins.
        device, trust: as for :func:`open_classifier`.
        weights: a file of the backbone's weights.
        image_size: of a named backbone: height and width in pixels.

    Raises:
        InputError: there is neither, it cannot be loaded, or it has no output of features.
    """
    folder = Path(path)
    if not folder.exists():
        return _of_name(path, device, weights, image_size)
    if image_size is not None:
        raise InputError(f"{path} has a size of its own: leave out `image_size`")
    if (folder / MANIFEST).is_file():
        if weights is not None:
            raise InputError(f"{path} is a bundle, which holds its weights: leave out `weights`")
        return _of_bundle(folder, device, trust, "features")
    if not (folder / CONFIG).is_file() and not (folder / FOLDS).is_file():
        raise _neither(folder)
    trained = load_run(folder, read_run(folder), weights=weights)
    check_features(trained.model, path)
    width = trained.model.num_features
    return _of_run(trained, Features(fold(trained.model)), width, device)


def identify(
    path: str, *, weights: str | None = None, image_size: int | None = None
) -> dict[str, Any]:
    """Return the hashes of :attr:`ImageModel.identity`; only a named backbone is loaded for them.

    Args:
        path, weights, image_size: as for :func:`open_embedder`.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return {"bundle": sha256_file(folder / MANIFEST)}
    if (folder / CONFIG).is_file() or (folder / FOLDS).is_file():
        return hash_run(folder, read_run(folder))
    if folder.exists():
        raise _neither(folder)
    model = _of_name(path, "cpu", weights, image_size)
    return {key: value for key, value in model.identity.items() if key != "runtime"}


class _Both(nn.Module):
    """Map images to logits and features, side by side [B, classes + dim]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = WithFeatures(model)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.model(images), dim=1)


def _neither(folder: Path) -> InputError:
    if not folder.exists():
        return InputError(f"{folder} does not exist; expected a bundle, or the folder of a run")
    if (folder / REQUEST).is_file():
        return InputError(f"{folder} holds an unfinished run: resume its training first")
    return InputError(
        f"{folder} is neither a bundle (it has no {MANIFEST}) nor a run (no {CONFIG})"
        f"{meant_run(folder)}"
    )


def _of_bundle(folder: Path, device: str, trust: bool, wanted: str) -> ImageModel:
    predictor = load(folder, device=device, trust=trust)
    classes = predictor.classes if wanted != "features" else ()
    if wanted != "classes" and predictor.tasks:
        raise InputError(
            f"{folder} has several tasks, whose adapters have features of their own: give the run "
            "folder of one"
        )
    if wanted != "classes" and predictor.classes and not predictor.num_features:
        raise InputError(
            f"{folder} has no output of features, only its classes: export it with "
            "--with-features, or give the run folder that it was exported from"
        )
    if predictor.others:
        raise InputError(
            f"{folder} takes {' and '.join(predictor.others)} beside images, which no file of "
            "images holds: give them in Python, fa.export.load"
        )
    runtime, width, run = predictor.runtime.name, predictor.width, predictor.run
    if wanted == "features" and predictor.classes:
        run, width = predictor.run_features, predictor.num_features
    elif wanted == "all" and predictor.classes:
        run, width = predictor.run_with_features, width + predictor.num_features
    return ImageModel(
        run,
        width,
        classes,
        predictor.reading,
        predictor.graph_input.preprocess.intensity_range,
        f"{predictor.artefact.path} in {runtime}",
        {
            "bundle": sha256_file(folder / MANIFEST),
            "file": predictor.artefact.path,
            "runtime": runtime,
        },
        predictor.decision,
        predictor.tasks,
    )


def _of_name(name: str, device: str, weights: str | None, image_size: int | None) -> ImageModel:
    """Open a backbone by its name; where it is none, it may be a folder that is not there."""
    try:
        return _of_backbone(name, device, weights, image_size)
    except UnknownModel as error:
        raise InputError(f"there is no folder {name}, and {error}") from None


def _of_backbone(name: str, device: str, weights: str | None, image_size: int | None) -> ImageModel:
    size = None if image_size is None else (3, image_size, image_size)
    config = AdaptConfig(adapter="none", input_size=size)
    model = adapt(name, config, weights=weights).eval()
    identity: dict[str, Any] = {"backbone": name, "weights": backbone_fingerprint(model)}
    if image_size is not None:
        identity["image_size"] = image_size
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg)
    return _in_pytorch(Features(model), model.num_features, (), preprocess, identity, device)


def _of_run(trained: Trained, module: nn.Module, width: int, device: str) -> ImageModel:
    classes = () if isinstance(module, Features) else tuple(trained.labels)
    hashes = ("config_sha256", "adapter_sha256")
    identity = {key: trained.source[key] for key in hashes}
    found = _in_pytorch(module, width, classes, trained.preprocess, identity, device)
    return replace(found, decision=trained.decision)


def _in_pytorch(
    module: nn.Module,
    width: int,
    classes: tuple[str, ...],
    preprocess: Preprocess,
    identity: dict[str, Any],
    device: str,
) -> ImageModel:
    on = parse_device(device)
    module = module.requires_grad_(False).eval().to(on)
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    dtype = next(floats, torch.float32)

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(pixels).to(on).permute(0, 3, 1, 2)
        outputs = module(preprocess.normalize(images).to(dtype))
        return outputs.float().cpu().numpy()

    return ImageModel(
        run,
        width,
        classes,
        Reading(preprocess.geometry, preprocess.intensity_range),
        preprocess.intensity_range,
        f"PyTorch, {on.type.upper()}",
        {**identity, "runtime": f"PyTorch, {on.type.upper()}"},
    )
