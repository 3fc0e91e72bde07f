"""Write the files of a finished run: the model, its scores and predictions, pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fastadapt.checkpoint import save_adapter, set_temperature
from fastadapt.decision import Decision, choose_decision
from fastadapt.files import write_json, write_text
from fastadapt.info import versions
from fastadapt.train.linear_probe import LARGEST, linear_probe
from fastadapt.train.loop import Trainer
from fastadapt.train.request import REQUEST
from fastadapt.train.results import (
    DECIDED,
    TrainResult,
    calibration,
    probe_scores,
    softmax,
    split_scores,
    too_many_for_a_probe,
    write_predictions,
)
from fastadapt.train.run_folder import (
    CURVES,
    EVALUATION,
    LABELS,
    MISTAKES,
    PREDICTIONS,
    RESULTS,
    SPLITS,
    STATE,
    write_metrics,
)

RECORDED = ("python", "fastadapt", "torch", "timm")  # versions worth keeping with a run


def frozen_probe(trainer: Trainer) -> dict[str, Any] | None:
    """Fit the linear probe before training, where training will not have cached features.

    That takes one pass over the images through the backbone as it is before it trains.

    Returns:
        Its results; ``None`` where features are cached, or the images are too many.
    """
    dataset = trainer.dataset
    if not trainer.config.probe or (trainer.cached and trainer.state.stage == 1):
        return None
    images = len(dataset.split("train"))
    if images * trainer.model.num_features * len(dataset.classes) > LARGEST:
        line = too_many_for_a_probe(images, len(dataset.classes))
        trainer.progress.console.print(line, markup=False)
        return None
    splits = [split for split in ("train", "val", "test") if dataset.split(split)]
    with trainer.phases("probe"):
        pooled = {split: trainer.pooled_features(split) for split in splits}
        labels = {
            split: np.array([sample.label for sample in dataset.split(split)]) for split in splits
        }
        return trainer.processes.on_first(lambda: linear_probe(pooled, labels, dataset.classes))


def write_outputs(trainer: Trainer, data: str, probe: dict[str, Any] | None = None) -> TrainResult:
    """Write the run folder's files from the weights that were kept, and drop the state.

    Args:
        trainer: that has trained.
        data: what it was trained on, for the configuration.
        probe: the linear probe's results, where they are known; fitted here otherwise.
    """
    trainer.load_best()
    state, logits = trainer.state, dict[str, Tensor]()
    # After a refit the model that is saved has trained on the validation images.
    logits["val"] = state.held_out["val"] if state.refit else trainer.final_logits("val")
    if trainer.dataset.split("test"):
        logits["test"] = trainer.final_logits("test")
    return trainer.processes.on_first(lambda: _write(trainer, data, logits, probe))


def _write(
    trainer: Trainer, data: str, raw: dict[str, Tensor], probe: dict[str, Any] | None
) -> TrainResult:
    out, state, dataset = trainer.out, trainer.state, trainer.dataset
    history, kept = state.judged()
    best = history[kept]
    calibrated = calibration(dataset, raw, trainer.config.calibrate)
    temperature = calibrated["temperature"]
    logits = {name: values / temperature for name, values in raw.items()}
    decision, notes = choose_decision(
        softmax(logits["val"]),
        np.array([sample.label for sample in dataset.split("val")]),
        trainer.config.threshold,
        trainer.config.abstain,
    )
    for line in notes:
        trainer.progress.console.print(line, markup=False)
    results: dict[str, Any] = {
        "classes": list(dataset.classes),
        "best": best,
        **{
            name: split_scores(dataset, name, values, trainer.loss(name, raw[name]), decision)
            for name, values in logits.items()
        },
        "calibration": calibrated,
        "decision": decision.to_dict(),
    }
    if state.refit:
        results["refit"] = _refit(trainer, temperature, decision)
    if trainer.config.probe:
        with trainer.phases("probe"):
            fitted = probe or probe_scores(trainer.features, dataset.classes)
        if not isinstance(fitted, str):
            results["linear_probe"] = fitted
        elif trainer.features:
            trainer.progress.console.print(fitted, markup=False)
    set_temperature(trainer.model, temperature)
    save_adapter(
        trainer.model,
        out,
        decision=decision.to_dict(),
        labels=list(dataset.classes),
        preprocess=trainer.preprocess.to_dict(),
        train={
            "data": data,
            "settings": trainer.settings,
            "intensity_range": trainer.config.intensity_range,
            "best": best,
            "versions": {k: v for k, v in versions().items() if k in RECORDED},
        },
    )
    write_text(out / LABELS, "".join(f"{name}\n" for name in dataset.classes))
    dataset.write_splits(out / SPLITS)
    write_metrics(out, history)
    # matplotlib, of which only the end has need (imports_ahead)
    from fastadapt.train.mistakes import Mistakes, draw_mistakes
    from fastadapt.train.plots import plot_curves, plot_evaluation

    plot_curves(history, out / CURVES, kept)
    write_predictions(out / PREDICTIONS, dataset, logits, decision)
    held_out = list(raw)[-1]
    labels = np.array([sample.label for sample in dataset.split(held_out)])
    probabilities, paths = softmax(logits[held_out]), [s.path for s in dataset.split(held_out)]
    if trainer.shared is None:  # of several runs the pictures are drawn once, of all
        plot_evaluation(
            out / EVALUATION,
            held_out,
            results[held_out],
            labels,
            probabilities,
            dataset.classes,
        )
        draw_mistakes(
            out / MISTAKES,
            Mistakes.find(paths, labels, decision.classes(probabilities), probabilities),
            dataset.classes,
            trainer.preprocess.intensity_range,
        )
    write_json(out / RESULTS, results)
    trainer.remove_unused_caches()
    with trainer.phases("saving"):
        trainer.finish()
    # What it holds is in the files above, but for the optimizer's moments.
    (out / STATE).unlink(missing_ok=True)
    (out / REQUEST).unlink(missing_ok=True)
    return TrainResult(out, best, results)


def _refit(trainer: Trainer, temperature: float, decision: Decision) -> dict[str, Any]:
    """Say what a refit trained on, and how good the model before it is on test images."""
    dataset, state = trainer.dataset, trainer.state
    found: dict[str, Any] = {
        "images": len(dataset.split("train", "val")),
        "train_loss": state.history[-1]["train_loss"],
    }
    if "test" in state.held_out:
        raw = state.held_out["test"]
        scores = split_scores(
            dataset, "test", raw / temperature, trainer.loss("test", raw), decision
        )
        found["held_out_test"] = {name: scores[name] for name in ("loss", *DECIDED)}
    return found
