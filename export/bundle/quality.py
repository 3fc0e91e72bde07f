"""Say in a bundle how good its model is on images that it did not train on."""

from __future__ import annotations

from typing import Any

from fastadapt.train.metrics import SCORES

MOST_CLASSES = 50  # of a confusion matrix in a manifest


def quality_of(results: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what a manifest holds of a run's results, or of the summary of folds.

    Args:
        results: ``results.json`` or ``folds.json``; ``None`` where nothing is known.

    Returns:
        ``split`` and ``images`` that judged, ``scores`` with ``intervals``, ``per_class``,
        ``confusion`` and ``reliability``; ``linear_probe``; of a run ``calibration`` too, and of
        one that was trained again on validation images ``refit``, their number with those of
        training; of folds
        ``mean`` with deviations over ``runs``, and what was fitted to the ``ensemble``. ``None``
        for results of older versions.
    """
    if results is None:
        return None
    folds = "pooled" in results
    split = results.get("held_out") if folds else ("test" if "test" in results else "val")
    scores = results.get("pooled") if folds else results.get(str(split))
    if not isinstance(scores, dict) or not isinstance(scores.get("images"), int):
        return None
    found: dict[str, Any] = {
        "split": split,
        "images": scores["images"],
        "scores": {name: scores.get(name) for name in SCORES},
        "intervals": scores.get("intervals", {}),
        "per_class": scores.get("per_class", {}),
        "reliability": scores.get("reliability", []),
    }
    if len(scores.get("confusion", ())) <= MOST_CLASSES:
        found["confusion"] = scores.get("confusion", [])
    for name in ("likeliest_class", "decided"):
        if name in scores:
            found[name] = scores[name]
    if folds:
        found["runs"] = len(results.get("runs", ()))
        found["mean"] = results.get("mean", {})
        found["ensemble"] = results.get("ensemble", {})
        return found
    probe = results.get("linear_probe", {}).get(str(split))
    if isinstance(probe, dict):
        found["linear_probe"] = {name: probe.get(name) for name in SCORES}
    found["calibration"] = results.get("calibration", {})
    if isinstance(results.get("refit"), dict):
        found["refit"] = results["refit"].get("images")
    return found
