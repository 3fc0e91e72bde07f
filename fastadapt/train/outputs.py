"""Write the files of a finished run: the model, its scores and predictions, pictures."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.checkpoint import save_adapter
from fastadapt.files import write_json, write_text
from fastadapt.info import versions
from fastadapt.train.loop import Trainer
from fastadapt.train.plots import plot_curves
from fastadapt.train.request import REQUEST
from fastadapt.train.results import (
    TrainResult,
    calibration,
    probe_scores,
    split_scores,
    write_predictions,
)
from fastadapt.train.run_folder import (
    CURVES,
    LABELS,
    PREDICTIONS,
    RESULTS,
    SPLITS,
    STATE,
    write_metrics,
)

RECORDED = ("python", "fastadapt", "torch", "timm")  # versions worth keeping with a run


def write_outputs(trainer: Trainer, data: str, probe: dict[str, Any] | None = None) -> TrainResult:
    """Write the run folder's files from the weights that were kept, and drop the state.

    Args:
        trainer: that has trained.
        data: what it was trained on, for the configuration.
        probe: the linear probe's results, where they are known; fitted here otherwise.
    """
    trainer.load_best()
    splits = ("val", "test") if trainer.dataset.split("test") else ("val",)
    logits = {name: trainer.final_logits(name) for name in splits}
    return trainer.processes.on_first(lambda: _write(trainer, data, logits, probe))


def _write(
    trainer: Trainer, data: str, logits: dict[str, Tensor], probe: dict[str, Any] | None
) -> TrainResult:
    out, state, dataset = trainer.out, trainer.state, trainer.dataset
    assert state.best is not None  # an epoch was completed
    best = state.history[state.best]
    results = {
        "classes": list(dataset.classes),
        "best": best,
        **{
            name: split_scores(dataset, name, values, trainer.loss(name, values))
            for name, values in logits.items()
        },
        "calibration": calibration(dataset, logits),
    }
    if trainer.config.probe:
        with trainer.phases("probe"):
            fitted = probe or probe_scores(trainer.features, dataset.classes)
        if isinstance(fitted, str):
            trainer.progress.console.print(fitted, markup=False)
        else:
            results["linear_probe"] = fitted
    save_adapter(
        trainer.model,
        out,
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
    write_metrics(out, state.history)
    plot_curves(state.history, out / CURVES, state.best)
    write_predictions(out / PREDICTIONS, dataset, logits)
    write_json(out / RESULTS, results)
    trainer.remove_unused_caches()
    with trainer.phases("saving"):
        trainer.finish()
    (out / REQUEST).unlink(missing_ok=True)
    # What it holds is in the files above, but for the optimizer's moments.
    (out / STATE).unlink(missing_ok=True)
    return TrainResult(out, best, results)
