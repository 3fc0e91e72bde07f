"""All kinds of damaged inputs, by name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.helpers.fuzz.bundles import Bundles
from tests.helpers.fuzz.checkpoints import Checkpoints, Safetensors
from tests.helpers.fuzz.folders import PeftFolders, Runs
from tests.helpers.fuzz.images import Images
from tests.helpers.fuzz.target import Answer, Target, answer
from tests.helpers.fuzz.texts import Listings, Lists, Tables

# How many of a hundred cases each kind gets: an image takes milliseconds, a bundle 0.1 s.
SHARES: dict[type[Target], int] = {
    Images: 38,
    Tables: 11,
    Listings: 8,
    Lists: 7,
    Safetensors: 10,
    Checkpoints: 14,
    Bundles: 4,
    Runs: 5,
    PeftFolders: 3,
}
NAMES = {kind.__name__.lower(): kind for kind in SHARES}


def run_case(target: Target, case: int, scratch: Path) -> Answer:
    """Run the case of this number, in a folder that is emptied before."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return answer(target, random.Random(f"{type(target).__name__} {case}"), scratch)
