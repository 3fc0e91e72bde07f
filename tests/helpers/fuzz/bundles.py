"""Bundles: what is loaded or verified must say and answer what the exported one does.

A damaged manifest is sealed again in most cases, as by somebody who knows how: then only what its
files say against it can refuse it.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import fastadapt as fa
from fastadapt.export.bundle.manifest import MANIFEST, list_files, read_manifest
from fastadapt.export.bundle.verify import verify_bundle
from fastadapt.files import seal
from tests.helpers.fuzz.models import make_bundle, picture
from tests.helpers.fuzz.mutations import as_json, mutate_bytes, mutate_json, mutate_text
from tests.helpers.fuzz.target import ACCEPTED, UNJUDGED, Target

# What a manifest says of its files; the rest is history, which no file can contradict.
FACTS = ("labels", "preprocessing", "model", "tasks")
FILES = ("labels.txt", "model.onnx", "golden.safetensors", "report.html", "golden/00.png")


class Bundles(Target):
    """Damaged manifests and files of bundles."""

    def __init__(self, folder: Path, bundle: Path | None = None):
        super().__init__(folder)
        self.bundle = bundle or make_bundle(folder)
        self.manifest = json.loads((self.bundle / MANIFEST).read_text())
        self.answer = _answer(self.bundle)

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Load or verify a damaged bundle; compare with the sound one."""
        bundle = scratch / "bundle"
        shutil.copytree(self.bundle, bundle)
        how, sealed = choose.randrange(8), True
        if how <= 4:
            part = choose.choice((None, None, "model", "preprocessing", "artefacts", "golden"))
            sealed = self._damage_manifest(choose, bundle, part)
        else:
            name = choose.choice(FILES)
            file = bundle / name
            if name == "labels.txt":
                file.write_text(
                    mutate_text(choose, file.read_text(), ("\n", "a", "\r\n")),
                    encoding="utf-8",
                    errors="replace",
                )
            else:
                file.write_bytes(mutate_bytes(choose, file.read_bytes()))
            sealed = choose.random() < 0.7
            if sealed:
                _seal(bundle, {**self.manifest, "files": list_files(bundle)})
        verified = choose.random() < 0.5
        if verified:
            found = verify_bundle(bundle, speed=False)
            if not found.passed:
                return ACCEPTED  # verify says that it is not as it was
        answer = _answer(bundle)
        if not sealed and answer.facts != self.answer.facts:
            return "accepted other facts than were hashed"
        return self._judge(bundle, answer, verified)

    def _damage_manifest(self, choose: random.Random, bundle: Path, part: str | None) -> bool:
        """Write a damaged manifest; say whether its hash was made to fit."""
        whole = json.loads(json.dumps(self.manifest))
        if part is None:
            damaged = mutate_json(choose, whole)
        else:
            damaged = {**whole, part: mutate_json(choose, whole[part])}
        sealed = isinstance(damaged, dict) and choose.random() < 0.85
        if sealed:
            try:
                damaged = seal(damaged)
            except (ValueError, UnicodeError):
                sealed = False
        file = bundle / MANIFEST
        if choose.random() < 0.8:
            file.write_text(json.dumps(damaged))
        else:
            file.write_bytes(as_json(choose, damaged))
        return sealed

    def _judge(self, bundle: Path, answer: Answer, verified: bool) -> str:
        facts, wanted = answer.facts, self.answer.facts
        graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        if json.loads(metadata.get("labels", "null")) not in (None, facts["labels"]):
            return "labels are not those of the graph"
        if facts["model"] != wanted["model"] and _says_otherwise(facts["model"], graph):
            return f"the manifest's model is not the graph's: {facts['model']}"
        if facts["preprocessing"] != wanted["preprocessing"]:
            return f"other preprocessing was accepted: {facts['preprocessing']}"
        if facts["labels"] != wanted["labels"]:
            return f"other labels were accepted: {facts['labels']}"
        if verified and not np.allclose(answer.logits, self.answer.logits, atol=2e-2):
            return "the outputs are others, and verify has passed"
        return ACCEPTED if facts == wanted else UNJUDGED


class Answer:
    """What a loaded bundle says and answers."""

    def __init__(self, facts: dict[str, Any], logits: np.ndarray):
        self.facts, self.logits = facts, logits


def _answer(bundle: Path) -> Answer:
    manifest = read_manifest(bundle)
    predict = fa.export.load(bundle)
    facts = {name: manifest.get(name) for name in FACTS}
    facts["labels"] = list(predict.classes)
    return Answer(facts, predict([picture()]).logits)


def _seal(bundle: Path, manifest: dict[str, Any]) -> None:
    (bundle / MANIFEST).write_text(json.dumps(seal(manifest)))


def _says_otherwise(model: dict[str, Any], graph: onnx.ModelProto) -> bool:
    """Say whether the manifest's entry contradicts the graph."""
    opset = next((entry.version for entry in graph.opset_import if not entry.domain), None)
    if model.get("opset") != opset:
        return True
    for entries, values in (
        (model["inputs"], graph.graph.input),
        (model["outputs"], graph.graph.output),
    ):
        if [entry["name"] for entry in entries] != [value.name for value in values]:
            return True
        for entry, value in zip(entries, values, strict=True):
            kind = value.type.tensor_type
            numpy = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
            shape = [d.dim_value or d.dim_param for d in kind.shape.dim]
            if (entry["dtype"], entry["shape"]) != (numpy, shape):
                return True
    return False
