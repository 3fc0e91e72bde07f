"""``report.html``: the manifest for people, in one file with its pictures, nothing to fetch."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

from fastadapt.decision import Decision
from fastadapt.errors import counted

from ..speed import format_rate
from ..tasks import named_tasks
from .golden import GoldenSamples
from .report_figures import parity_svg, reliability_svg, speed_svg

THUMBNAIL = 96
MOST_CLASSES = 10  # of a task that are named
TASK_SCORES = ("accuracy", "balanced_accuracy", "macro_f1")
PER_CLASS = ("precision", "recall", "f1", "auroc", "average_precision")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
h3 { font-size: 1rem } pre { font-size: .8rem; overflow-x: auto } summary { cursor: pointer }
table { border-collapse: collapse; font-size: .9rem } svg { max-width: 100%; height: auto }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd;
         vertical-align: top } td.number, th.number { text-align: right }
code { font-size: .85rem; overflow-wrap: anywhere } .note { color: #666 }
.verdict { padding: .5rem .8rem; border-left: .4rem solid; background: #f5f5f5 }
.good { border-color: #2a7d2e } .bad { border-color: #b3261e }
figure { display: inline-block; margin: 0 .6rem .8rem 0; width: 6.5rem; font-size: .8rem }
figure img { width: 6rem; height: 6rem; object-fit: cover; display: block }
figcaption { overflow-wrap: anywhere }
"""


def render_report(manifest: dict[str, Any], golden: GoldenSamples) -> str:
    """Render the report as HTML.

    Args:
        manifest: of the bundle.
        golden: its golden samples.
    """
    name = manifest["backbone"]["name"]
    sections = [
        _summary(manifest),
        ("Tasks", _tasks(manifest)),
        *_qualities(manifest),
        ("Agreement with the trained model", _parity(manifest)),
        ("Files that run", _artefacts(manifest)),
        ("Speed", _speed(manifest)),
        ("Golden samples", _golden(manifest, golden)),
        ("From an image file to the model", _preprocessing(manifest)),
        ("What was folded", _folded(manifest)),
        ("Made with", _environment(manifest)),
        ("Files", _files(manifest)),
    ]
    body = "\n".join(
        part if isinstance(part, str) else f"<h2>{escape(part[0])}</h2>\n{part[1]}"
        for part in sections
        if isinstance(part, str) or part[1]
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>Bundle of {escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>Bundle of {escape(name)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _summary(manifest: dict[str, Any]) -> str:
    made = f'<p class="note">Made {escape(manifest["created"])}, schema {manifest["schema"]}</p>'
    if manifest["accepted"]:
        verdict = "Accepted: every file that ran gives the trained model's outputs."
        return f'{made}\n<p class="verdict good">{verdict}</p>'
    reasons = "".join(f"<li>{escape(problem)}</li>" for problem in manifest["problems"])
    return f'{made}\n<div class="verdict bad">Rejected.<ul>{reasons}</ul></div>'


def _tasks(manifest: dict[str, Any]) -> str:
    """List several tasks: each task's output, classes, and scores of its run; else nothing."""
    rows = []
    for task in named_tasks(manifest):
        labels, found = task["labels"], task.get("quality") or {}
        classes = ", ".join(labels[:MOST_CLASSES]) + (", …" if len(labels) > MOST_CLASSES else "")
        scores = found.get("scores", {})
        rows.append(
            (
                task["name"],
                len(labels),
                classes,
                task.get("source", {}).get("run", "–"),
                f"{found['images']} {found['split']}" if found else "–",
                *(_number(scores.get(name), ".4f") for name in TASK_SCORES),
            )
        )
    if not rows:
        return ""
    columns = ("task and output", "", "classes", "run", "judged by images")
    scores = [name.replace("_", " ") for name in TASK_SCORES]
    note = "<p>The backbone is in the graph once; each task has an adapter and an output.</p>"
    return note + _table((*columns, *scores), rows)


def _qualities(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Say how good the model is, or how good it is in each of several tasks."""
    tasks, title = named_tasks(manifest), "How good the model is"
    if not tasks:
        return [(title, _quality(manifest))]
    return [(f"{title}: {task['name']}", _quality(task)) for task in tasks]


def _quality(manifest: dict[str, Any]) -> str:
    """Show scores beside the linear probe's, the decision, the temperature, and each class."""
    found = manifest.get("quality")
    if not found:
        return '<p class="note">Not known: the model was exported without results of a test.</p>'
    judged = f"{counted(found['images'], found['split'] + ' image')}"
    mean = found.get("mean", {})
    if "runs" in found:
        own = found.get("ensemble", {}).get("test")
        judged = f"{counted(found['runs'], 'run')}, each on images that it did not see; "
        judged += (
            "their ensemble, which this bundle holds, was not judged on any others"
            if own is None
            else f"their ensemble, which this bundle holds, has accuracy {own['accuracy']:.4f} on "
            f"{own['images']} test images"
        )
    rows = []
    for name, value in found["scores"].items():
        low_high = found["intervals"].get(name)
        probe = found.get("linear_probe", {}).get(name)
        spread = mean.get("model", {}).get(name)
        if spread is not None:
            value, probe = spread["mean"], mean.get("linear_probe", {}).get(name, {}).get("mean")
        rows.append(
            (
                name.replace("_", " "),
                _number(value, ".4f"),
                _number(spread and spread["std"], ".4f"),
                "–" if low_high is None else " to ".join(_number(v, ".4f") for v in low_high),
                _number(probe, ".4f"),
            )
        )
    columns = ("score", "model", "± over runs", "95 % interval", "linear probe")
    per_class = [
        (name, row.get("images"), *(_number(row.get(key), ".4f") for key in PER_CLASS))
        for name, row in found["per_class"].items()
    ]
    decision = Decision.from_dict(manifest.get("decision"), "the manifest")
    temperature = manifest.get("calibration", {}).get("temperature", 1.0)
    several = temperature if isinstance(temperature, list) else [temperature]
    said = ", ".join(f"{value:.3g}" for value in several)
    whole = manifest.get("calibration", {}).get("ensemble", 1.0)
    said += "" if whole == 1 else f", and their mean by {whole:.3g}"
    notes = [f"Judged by {judged}.", f"Decision: {decision}. Logits are divided by {said}."]
    if found.get("refit"):
        images = found["refit"]
        notes.append(
            f"The model was trained again on {counted(images, 'image')}, validation among them."
        )
        if found["split"] == "val":
            notes.append("The scores are of the model before that, which had not seen them.")
    calibration = found.get("calibration", {})
    if calibration.get("note"):
        notes.append(f"The temperature is 1, since {calibration['note']}.")
    if "decided" in found:
        kept = found["decided"]
        share = kept["images"] / found["images"]
        accuracy = _number(kept.get("accuracy"), ".4f")
        notes.append(f"Decided are {share:.0%} of these images, with accuracy {accuracy}.")
    text = "".join(f"<p>{escape(note)}</p>" for note in notes)
    text += _table(columns, rows) + reliability_svg(found["reliability"])
    return text + _table(("class", "images", *PER_CLASS), per_class)


def _parity(manifest: dict[str, Any]) -> str:
    text = (
        "<p>Largest difference over the outputs' spread from image to image, for every pair of "
        "models and batch size.</p>"
    )
    parities = manifest["parity"]
    stages = {p["stage"] for p in parities}
    parities = parities + [
        {**p, "stage": f"{artefact['path'] or artefact['precision']}, {p['stage']}"}
        for artefact in manifest["artefacts"]
        for p in artefact["parity"]
        if p["stage"] not in stages
    ]
    rows = [
        (
            p["stage"],
            p["batch"],
            _number(p["error"], ".1e"),
            _number(p["limit"], ".0e"),
            _number(p["cosine"], ".6f"),
            _number(p["top1"], ".0%"),
            "passed" if p["passed"] else "; ".join(p["problems"]),
        )
        for p in parities
    ]
    columns = ("compared", "batch", "error", "at most", "cosine", "same class", "")
    return text + parity_svg(parities) + _table(columns, rows)


def _artefacts(manifest: dict[str, Any]) -> str:
    rows = [
        (a["path"] or "–", a["kind"], a["precision"], a["status"], a["reason"])
        for a in manifest["artefacts"]
    ]
    graphs = [("model.onnx", manifest["model"])]
    graphs += [(a["path"], a["details"]) for a in manifest["artefacts"] if a["path"]]
    taken = [
        (path, runtime, text)
        for path, graph in graphs
        for runtime, text in graph.get("taken_by", {}).items()
    ]
    older = _table(("ONNX file", "is taken by", ""), taken) if taken else ""
    return (
        _table(("file", "for", "precision", "status", "why"), rows)
        + older
        + "".join(
            _details(artefact) for artefact in manifest["artefacts"] if len(artefact["details"]) > 1
        )
    )


def _details(artefact: dict[str, Any]) -> str:
    """Describe how a file was built: a short table, and all details to unfold."""
    details, rows = artefact["details"], []
    if "version" in details:
        rows.append(("built with", f"{details.get('library', '')} {details['version']}"))
    if details.get("targets"):
        rows.append(("for", ", ".join(details["targets"])))
    rows.append(("batch sizes", ", ".join(f"{k} {v}" for k, v in details["batch"].items())))
    if "fp32_layers" in details:
        rows.append(("kept in fp32", ", ".join(details["fp32_layers"]) or "no layer"))
    if "fused_attention" in details:
        rows.append(("layers with fused attention", str(details["fused_attention"])))
    if "calibration" in details:
        rows.append(("calibration", details["calibration"]))
    if "fp8_layers" in details:
        rows.append(("in FP8", f"{counted(len(details['fp8_layers']), 'layer')}"))
    for kind, counts in details.get("summary", {}).get("precision", {}).items():
        rows.append((f"layers: {kind}", ", ".join(f"{n} in {p}" for p, n in counts.items())))
    everything = escape(json.dumps(details, indent=1, ensure_ascii=False))
    return (
        f"<h3>{escape(artefact['path'] or artefact['precision'])}</h3>\n{_table(('', ''), rows)}"
        f"<details><summary>all that is known</summary><pre>{everything}</pre></details>\n"
    )


def _speed(manifest: dict[str, Any]) -> str:
    rows = [
        (artefact["path"], provider, int(batch), value)
        for artefact in manifest["artefacts"]
        for provider, speeds in artefact["speed"].items()
        for batch, value in speeds.items()
    ]
    if not rows:
        return ""
    machines = dict.fromkeys(row["machine"] for row in manifest.get("measured", ()))
    where = "; ".join(machines or manifest["environment"]["devices"])
    note = f'<p class="note">Measured where the bundle was made: {escape(where)}</p>'
    columns = ("file", "runtime", "batch", "images/s")
    return (
        note
        + speed_svg(rows)
        + _table(columns, [(*row, format_rate(value)) for *row, value in rows])
    )


def _golden(manifest: dict[str, Any], golden: GoldenSamples) -> str:
    figures = []
    samples = zip(golden.images, golden.labels, golden.expected, strict=True)
    for index, (image, label, outputs) in enumerate(samples):
        caption = [] if label is None else [f"is {label}"]
        if manifest["labels"]:
            caption.append(f"model: {manifest['labels'][int(outputs.argmax())]}")
        for task in golden.tasks:
            caption.append(f"{task.name}: {task.classes[int(outputs[task.columns].argmax())]}")
        text = escape(", ".join(caption))
        figures.append(
            f'<figure><img src="{_thumbnail(image)}" alt="golden sample {index}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    origin = escape(manifest["golden"]["origin"])
    return f'<p class="note">From {origin}</p>\n{"".join(figures)}'


def _thumbnail(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _preprocessing(manifest: dict[str, Any]) -> str:
    settings = manifest["preprocessing"]
    value = manifest["model"]["inputs"]
    shapes = ", ".join(f"{v['name']}: {v['dtype']} {v['shape']}" for v in value)
    rows = [
        (n, step["step"], "in the graph" if step["in_graph"] else "before it")
        for n, step in enumerate(settings["steps"], 1)
    ]
    return f"<p>The graph takes {escape(shapes)}.</p>{_table(('', 'step', 'where'), rows)}"


def _folded(manifest: dict[str, Any]) -> str:
    report = manifest["fold_report"]
    rows = [
        (layer["name"], layer["kind"], layer["folded"], f"{layer['error']:.1e}", layer["probe"])
        for layer in report["layers"]
    ]
    rows += [(name, "unused", "dropped", "", "") for name in report["dropped"]]
    if not rows:
        return "<p>Nothing: the model was made of ordinary layers already.</p>"
    return _table(("layer", "kind", "folded into", "error", "measured on"), rows)


def _environment(manifest: dict[str, Any]) -> str:
    made = manifest["environment"]
    rows = [*made["versions"].items(), ("system", made["system"])]
    rows += [("device", device) for device in made["devices"]]
    rows += [("GPU", ", ".join(f"{k} {v}" for k, v in gpu.items())) for gpu in made["gpus"]]
    return _table(("", ""), rows)


def _files(manifest: dict[str, Any]) -> str:
    rows = [
        (name, f"{file['bytes'] / 1e6:.2f}", _Code(file["sha256"]))
        for name, file in manifest["files"].items()
    ]
    return _table(("file", "MB", "SHA-256"), rows)


class _Code(str):
    """Text in a monospaced font."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, _Code):
            return f"<td><code>{escape(value)}</code></td>"
        kind = ' class="number"' if isinstance(value, int | float) else ""
        return f"<td{kind}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>\n"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
