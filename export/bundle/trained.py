"""The model that is exported: a run's, or a timm model with a checkpoint or a PEFT folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.backbones import create_backbone
from fastadapt.checkpoint import CONFIG, WEIGHTS, load_adapter, temperature_of
from fastadapt.checkpoint_reader import read_checkpoint
from fastadapt.data.preprocess import Preprocess
from fastadapt.decision import LIKELIEST, Decision
from fastadapt.errors import InputError, counted, nearest
from fastadapt.files import (
    read_json,
    read_tensors,
    sha256_file,
    sha256_tensors,
)
from fastadapt.gdpl.checkpoint import FORMAT as GDPL_FORMAT
from fastadapt.gdpl.checkpoint import load_gdpl
from fastadapt.gdpl.domain_features import FeatureTable
from fastadapt.gdpl.model import GDPLModel
from fastadapt.lora import load_peft, replaced_parameters
from fastadapt.train.ensemble import FoldEnsemble, load_folds
from fastadapt.train.ensemble_fit import ensemble_of
from fastadapt.train.fold_results import FOLDS, read_folds
from fastadapt.train.fold_results import FORMAT as FOLDS_FORMAT
from fastadapt.train.run_folder import RESULTS, check_finished
from fastadapt.weights_match import load_weights, meta_model

from ..tasks import Task, place_side_by_side


@dataclass(frozen=True)
class TrainedTask:
    """One of several tasks of a model to export.

    Attributes:
        name: of the task.
        trained: the run that it is from; its ``model`` is a member of the whole one.
    """

    name: str
    trained: Trained


@dataclass(frozen=True)
class Trained:
    """A model to export, and what its bundle records of it.

    Attributes:
        model: normalised fp32 images [B, 3, H, W] to [B, classes], or features without a head.
        preprocess: from image files to the model's input.
        labels: class names in the outputs' order; empty without a head.
        backbone: name of the backbone.
        source: the files that the model was loaded from, with hashes, for the manifest.
        decision: how probabilities become classes.
        quality: how good the model is on images that it did not train on, where that is known:
            the run's ``results.json``, or the summary of folds.
        domain_features: GDPL, where they are an input of the graph: computes the features
            [B, D_f] of samples from their paths and normalised images.
        parts: where the model has several tasks, each of them.
    """

    model: nn.Module
    preprocess: Preprocess
    labels: list[str]
    backbone: str
    source: dict[str, Any]
    domain_features: Callable[[list[Path], Tensor], Tensor] | None = None
    decision: Decision = LIKELIEST
    quality: dict[str, Any] | None = None
    parts: tuple[TrainedTask, ...] = ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks' columns, classes and decisions; none for one model."""
        return place_side_by_side(
            [(part.name, part.trained.labels, part.trained.decision) for part in self.parts]
        )

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The backbone's description by timm, as far as it is JSON."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        return json.loads(json.dumps(dict(config), default=str))


def read_run(run: Path) -> dict[str, Any]:
    """Read a run's configuration; raise InputError for no run, or an unfinished one."""
    if not run.is_dir():
        raise InputError(f"{run} is no folder; expected a training run with {CONFIG} and {WEIGHTS}")
    if (run / FOLDS).is_file():
        return read_folds(run)
    check_finished(run)
    return read_json(run / CONFIG)


def load_run(
    run: Path,
    config: dict[str, Any],
    *,
    backbone: nn.Module | None = None,
    weights: str | None = None,
    class_names: Sequence[str] | None = None,
    domain_input: bool = False,
    domain_features: str | Path | None = None,
    domain_weights: str | None = None,
) -> Trained:
    """Load the model of a run (or of what ``save_adapter`` or ``save_gdpl`` wrote).

    Args:
        run: folder of the run.
        config: what :func:`read_run` returned.
        backbone: the pretrained backbone (GDPL: the CLIP model), if it was given as a module.
        weights: a local file of its weights, where the recorded one is gone.
        class_names: GDPL only: other classes than those it was trained on.
        domain_input: GDPL only: make the domain features an input of the graph.
        domain_features: GDPL only: file of the features, for models without an encoder.
        domain_weights: GDPL only: a local file of the domain encoder's weights.

    Raises:
        InputError: something is missing or damaged, or options do not fit the model.
    """
    if config.get("format") == FOLDS_FORMAT:
        if class_names is not None or domain_input or domain_features is not None:
            raise InputError(f"{run} is no GDPL run: leave out `class_names` and domain features")
        return _load_folds(run, config, backbone, weights)
    model: AdaptedModel | GDPLModel
    decision, quality = LIKELIEST, None
    if config.get("format") == GDPL_FORMAT:
        model = load_gdpl(
            run,
            backbone,
            clip_weights=weights,
            class_names=class_names,
            domain_weights=domain_weights,
        )
        labels = list(model.class_names)
        name = (config["source"] or {}).get("clip", "open_clip model")
    elif class_names is not None:
        raise InputError(
            f"{run} is no GDPL run: its classes are outputs of its head, so that others need "
            "training; leave out `class_names`"
        )
    else:
        model = load_adapter(run, backbone, weights=weights)
        labels = _labels(config.get("labels"), model.num_classes, CONFIG)
        name = config["backbone"]["name"]
        decision = Decision.from_dict(config.get("decision"), str(run / CONFIG))
        if (run / RESULTS).is_file():
            quality = read_json(run / RESULTS)
    preprocess = config.get("preprocess")
    return Trained(
        model,
        Preprocess.from_pretrained_cfg(model.pretrained_cfg)
        if preprocess is None
        else Preprocess.from_dict(preprocess),
        labels,
        name,
        {
            "run": str(run),
            "config": config,
            **hash_run(run, config),
        },
        _domain_features(model, domain_input, domain_features),
        decision,
        quality,
    )


def _load_folds(
    out: Path, summary: dict[str, Any], backbone: nn.Module | None, weights: str | None
) -> Trained:
    """Load the runs of folds as one model that averages their logits."""
    model = load_folds(out, backbone, weights=weights)
    folders = [out / run["folder"] for run in summary["runs"]]
    config = read_json(folders[0] / CONFIG)
    return Trained(
        model,
        Preprocess.from_dict(config["preprocess"]),
        _labels(config.get("labels"), model.num_classes, CONFIG),
        config["backbone"]["name"],
        {
            "run": str(out),
            "config": config,
            "folds": [folder.name for folder in folders],
            "backbones": 1 if model.shared else len(folders),
            **hash_run(out, summary),
        },
        decision=ensemble_of(out, summary).decision,
        quality=summary,
    )


def hash_run(run: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of a run's configuration and weights; of folds, those of all of them.

    Args:
        run: folder of the run.
        config: what :func:`read_run` returned.
    """
    files = {"config_sha256": CONFIG, "adapter_sha256": WEIGHTS}
    if config.get("format") != FOLDS_FORMAT:
        return {key: sha256_file(run / name) for key, name in files.items()}
    folders = [run / each["folder"] for each in config["runs"]]
    hashes = {key: [sha256_file(f / name) for f in folders] for key, name in files.items()}
    return {key: hashlib.sha256(" ".join(h).encode()).hexdigest() for key, h in hashes.items()}


def temperatures(model: nn.Module) -> dict[str, Any]:
    """Return what a model's logits are divided by; of an ensemble each member's, and their mean."""
    if isinstance(model, FoldEnsemble):
        members = [each for each in model.members if isinstance(each, AdaptedModel)]
        return {
            "temperature": [temperature_of(each) for each in members],
            "ensemble": model.temperature,
        }
    return {"temperature": temperature_of(model) if isinstance(model, AdaptedModel) else 1.0}


def _domain_features(
    model: nn.Module, wanted: bool, file: str | Path | None
) -> Callable[[list[Path], Tensor], Tensor] | None:
    """Make :attr:`Trained.domain_features`; ``None`` if they are no input of the graph.

    Raises:
        InputError: the model takes none; it has no encoder, and no file is given; it has one, and
            a file is given.
    """
    if not isinstance(model, GDPLModel):
        if wanted or file is not None:
            raise InputError(
                "this run is no GDPL run: leave out `domain_input` and `domain_features`"
            )
        return None
    if model.domain_encoder is None:
        if file is None:
            raise InputError(
                "this model has no domain encoder, and the gate compares on real features: give "
                "those of the images with `domain_features=...`"
            )
        table = FeatureTable.read(file, model.prompt_learner.feature_dim)
        return lambda paths, _: table.of(paths)
    if file is not None:
        raise InputError("this model has a domain encoder of its own: leave out `domain_features`")
    encode = torch.no_grad()(model.domain_features)
    return (lambda _, images: encode(images)) if wanted else None


def load_timm(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    peft: str | Path | None = None,
    weights: str | Path | None = None,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    checkpoint_key: str | None = None,
    features: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Load a timm model as it is, fine-tuned, or with a LoRA that PEFT trained; without a run.

    Args:
        name: timm's name of the model.
        checkpoint: a state dict of the fine-tuned model, its classifier included if it has one.
        peft: folder that PEFT's ``save_pretrained`` wrote; a classifier in ``modules_to_save``
            replaces the model's.
        weights: a local file of the weights that ``peft`` was trained on; timm's if ``None``.
        image_size: for models that are built for one size.
        class_names: of the outputs; numbers if ``None``.
        checkpoint_key: which state dict of the file is meant, where it holds several.
        features: without a classifier, even if the file holds one.
        tell: receives a line that says which state dict was taken, where there were several.

    Raises:
        InputError: a file is missing, damaged or of another model; a classifier is not where the
            model has its own; options exclude each other.
    """
    if checkpoint is not None and (peft is not None or weights is not None):
        raise InputError(
            "`checkpoint` holds the whole model: leave out `peft` and `weights`, or give the "
            "weights that the PEFT folder was trained on with `weights=...`"
        )
    file = checkpoint or weights
    if file is None and checkpoint_key is not None:
        raise InputError("`checkpoint_key` chooses in a file: give one with `checkpoint=...`")
    read = None if file is None else read_checkpoint(file, checkpoint_key)
    state = None if read is None else read.state
    num_classes = None if state is None else _classifier_rows(name, state)
    model: Any = create_backbone(
        name,
        pretrained=state is None,
        image_size=image_size,
        num_classes=0 if features else num_classes,
        state=state,
    )
    if state is not None:
        load_weights(model, state, str(file), name=name, head=not features)
    source: dict[str, Any] = {"timm": name}
    for key, path in (("checkpoint", checkpoint), ("weights", weights)):
        if path is not None and read is not None:
            source[key] = {"file": str(path), "sha256": sha256_file(path), "key": read.key}
            source[key] |= {"candidates": list(read.candidates), "prefix": read.prefix}
            if read.choice and checkpoint_key is None:
                tell(f"{path}: {read.choice}")
    if peft is not None:
        _put_peft(model, Path(peft))
        files = ("adapter_config.json", "adapter_model.safetensors")
        hashes = {file: sha256_file(Path(peft) / file) for file in files}
        source["peft"] = {"folder": str(peft), "sha256": hashes}
    source["fingerprint"] = sha256_tensors(model.state_dict())
    # The size that the model was built for counts, not that of timm's configuration.
    size = None if image_size is None else (3, image_size, image_size)
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg, input_size=size)
    labels = _labels(class_names, model.num_classes, "`class_names`")
    return Trained(model.eval(), preprocess, labels, name, source)


def _put_peft(model: Any, folder: Path) -> None:
    """Load a PEFT folder; its classifier may have another number of classes than the model's."""
    rows, classifier = None, _classifier(model.pretrained_cfg)
    if classifier is not None and (folder / "adapter_model.safetensors").is_file():
        saved = read_tensors(folder / "adapter_model.safetensors")[0]
        keys = (f"base_model.model.{classifier}.{s}weight" for s in ("", "modules_to_save."))
        rows = next((len(saved[key]) for key in keys if key in saved), None)
    replaced = rows is not None and rows != model.num_classes
    if replaced:
        model.reset_classifier(rows)
    load_peft(model, folder)
    if replaced and classifier is not None:
        own = {f"{classifier}.{k}" for k, _ in model.get_submodule(classifier).named_parameters()}
        missing = sorted(own - replaced_parameters(model))
        if missing:
            raise InputError(f"{folder}: its classifier of {rows} classes lacks {missing[0]!r}")


def _classifier(config: dict[str, Any]) -> str | None:
    """Return the name of a timm model's classifier, the first one where there are two."""
    name = config.get("classifier")
    return name if name is None or isinstance(name, str) else name[0]


def _classifier_rows(name: str, state: dict[str, Tensor]) -> int:
    """Count the classes of a state dict's classifier; 0 if it has none."""
    architecture, _, tag = name.partition(".")
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(architecture) else None
    except RuntimeError:  # timm has no such tag
        known = timm.list_models(f"{architecture}.*", pretrained=True)
        raise InputError(
            f"timm has no {tag!r} of {architecture}. Nearest: {nearest(name, known)}. Or leave "
            f"the tag out: {architecture}"
        ) from None
    if config is None:  # a deprecated name, which timm resolves when it makes the model
        model = meta_model(name)
        config = None if model is None else model.pretrained_cfg
    else:
        config = config.to_dict()
    classifier = None if config is None else _classifier(config)
    weight = state.get(f"{classifier}.weight")
    return 0 if weight is None else len(weight)


def _labels(names: Sequence[str] | None, count: int, where: str) -> list[str]:
    if names is None:
        return [str(index) for index in range(count)]
    if len(names) != count:
        raise InputError(
            f"{where} names {counted(len(names), 'label')}; the model has "
            f"{counted(count, 'class', 'classes')}"
        )
    return [str(name) for name in names]
