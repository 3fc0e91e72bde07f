"""What every kind of input shares: a target, and how the answer to one case is judged."""

from __future__ import annotations

import random
import traceback
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

from fastadapt.errors import InputError

REFUSED, ACCEPTED, UNJUDGED = "refused", "accepted", "unjudged"
WRONG, RAW = "wrong", "raw"  # these two are faults


class Answer(NamedTuple):
    """The answer to a case: one of the words above, and what there is to say."""

    outcome: str
    detail: str = ""


class Target(ABC):
    """A kind of input.

    Args:
        folder: where sound inputs are made.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @abstractmethod
    def check(self, choose: random.Random, scratch: Path) -> str:
        """Mutate an input, give it to the package, and judge the answer.

        Args:
            choose: makes all choices.
            scratch: an empty folder for the mutated input.

        Returns:
            ``ACCEPTED`` if the oracle says the same as the package, ``UNJUDGED`` if it cannot say,
            and else what is wrong.

        Raises:
            InputError: the package refuses the input.
        """


def answer(target: Target, choose: random.Random, scratch: Path) -> Answer:
    """Run one case."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target.check(choose, scratch)
    except InputError as error:
        text = str(error)
        if len(text.splitlines()) != 1:
            return Answer(WRONG, f"the message has not one line: {text[:300]!r}")
        return Answer(REFUSED, text)
    except Exception as error:  # that is what is looked for
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:]]
        said = f"{type(error).__name__}: {error}"
        return Answer(RAW, f"{said[:300]} at {', '.join(places)}")
    if found in (ACCEPTED, UNJUDGED):
        return Answer(found)
    return Answer(WRONG, found)
