"""Folders of weights with a configuration: runs of this package, and what PEFT saves.

A run that is loaded must answer as it did before it was damaged; a PEFT folder, as PEFT itself
answers with it.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path

import peft
import timm
import torch
from torch import Tensor, nn

from fastadapt.data.preprocess import Preprocess
from fastadapt.export.bundle.trained import load_run, read_run
from fastadapt.files import read_json, seal
from fastadapt.lora import load_peft
from tests.helpers.fuzz.models import make_run, picture
from tests.helpers.fuzz.mutations import as_json, mutate_bytes, mutate_json, random_value
from tests.helpers.fuzz.target import ACCEPTED, UNJUDGED, Target

REGEXES = (
    "(a+)+$",
    "(.*)*x",
    "[",
    "(?P<a>x)",
    "qkv|proj",
    ".*",
    "blocks.0",
    "a{1,99999}",
    "^" * 500,
)
PEFT_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "bias")
PEFT_KEYS += ("modules_to_save", "use_rslora", "lora_dropout", "peft_type", "fan_in_fan_out")


def _images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class Runs(Target):
    """Damaged configurations and weights of runs."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.run = make_run(folder)
        self.config = json.loads((self.run / "config.json").read_text())
        self.said = self._said(self.run)

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Load a damaged run; compare what it says and answers."""
        run, sealed = scratch / "run", False
        shutil.copytree(self.run, run)
        if choose.random() < 0.8:
            damaged = mutate_json(choose, self.config)
            part = choose.choice((None, None, "adapt", "backbone", "lora_layers", "preprocess"))
            if part is not None:
                damaged = {**self.config, part: mutate_json(choose, self.config[part])}
            if isinstance(damaged, dict) and choose.random() < 0.6:
                damaged, sealed = seal(damaged), True  # as by somebody who knows how
            (run / "config.json").write_bytes(as_json(choose, damaged))
        else:
            file = run / choose.choice(("config.json", "adapter.safetensors"))
            file.write_bytes(mutate_bytes(choose, file.read_bytes()))
        labels, preprocess, outputs = self._said(run)
        wanted = self.said
        if sealed:  # nothing contradicts it: it must make sense
            Preprocess.from_dict(preprocess).transform(picture())
            fits = len(labels) == outputs.shape[1] and all(isinstance(name, str) for name in labels)
            return UNJUDGED if fits else f"{labels} for {outputs.shape[1]} outputs"
        if labels != wanted[0]:
            return f"other labels were accepted: {labels}"
        if preprocess != wanted[1]:
            return f"other preprocessing was accepted: {preprocess}"
        if outputs.shape != wanted[2].shape or not torch.equal(outputs, wanted[2]):
            return "the outputs are others"
        return ACCEPTED

    @staticmethod
    def _said(run: Path) -> tuple[list[str], dict[str, object], Tensor]:
        trained = load_run(run, read_run(run))
        with torch.no_grad():
            outputs = trained.model.eval()(_images())
        return trained.labels, trained.preprocess.to_dict(), outputs


class PeftFolders(Target):
    """Damaged PEFT folders."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        torch.manual_seed(0)
        self.model = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["qkv", "fc1"], modules_to_save=["head"], bias="none"
        )
        wrapped = peft.get_peft_model(copy.deepcopy(self.model), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(folder / "peft")
        self.config = json.loads((folder / "peft" / "adapter_config.json").read_text())

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Load a damaged folder; compare with PEFT."""
        folder = scratch / "peft"
        shutil.copytree(self.folder / "peft", folder)
        how = choose.randrange(10)
        if how <= 6:
            damaged = json.loads(json.dumps(self.config))
            if how <= 2:
                damaged = mutate_json(choose, damaged)
            elif how <= 4:
                key = choose.choice(PEFT_KEYS)
                held = damaged[key]
                known = isinstance(held, dict | list)
                damaged[key] = mutate_json(choose, held) if known else random_value(choose)
            elif how == 5:
                key = choose.choice(("rank_pattern", "alpha_pattern"))
                damaged[key] = {choose.choice(REGEXES): choose.choice((4, 6, 1, 0, -2, 2**40))}
            else:
                damaged["r"] = choose.choice((1, 4, 8, 0, -4, 2**40))
                damaged["lora_alpha"] = choose.choice((6, 3, 0, -1, 1e300, 2**70))
            (folder / "adapter_config.json").write_bytes(as_json(choose, damaged))
        else:
            file = folder / choose.choice(("adapter_model.safetensors", "adapter_config.json"))
            file.write_bytes(mutate_bytes(choose, file.read_bytes()))
        ours = copy.deepcopy(self.model)
        load_peft(ours, folder)
        with torch.no_grad():
            found = ours.eval()(_images())
        values = read_json(folder / "adapter_config.json")
        for key in ("rank_pattern", "alpha_pattern"):  # PEFT stumbles over null
            values[key] = values.get(key) or {}
        (folder / "adapter_config.json").write_text(json.dumps(values))  # without a byte order mark
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), str(folder))
            with torch.no_grad():
                wanted = theirs.eval()(_images())
        except Exception as error:  # whatever PEFT raises
            return f"accepted what PEFT refuses ({type(error).__name__}: {error})"[:300]
        if torch.allclose(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True):
            return ACCEPTED
        return f"the outputs are not PEFT's, by {float((found - wanted).abs().max()):.2e}"
