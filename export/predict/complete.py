"""Tell whether results that are complete are those that a command asks for, by their columns."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from fastadapt.errors import InputError

from .settings import EmbedSettings, PredictSettings


def check_columns(settings: PredictSettings | EmbedSettings, file: Path) -> None:
    """Refuse complete results of another command or with other columns.

    Args:
        settings: of the command that would go on with them.
        file: the results.

    Raises:
        InputError: it names the first column that is missing or not asked for; or the file cannot
            be read as what its ending says.
    """
    names = _names(file)
    predicts = isinstance(settings, PredictSettings)
    wanted = {"features": not predicts, "prediction": predicts}
    if isinstance(settings, PredictSettings):
        wanted |= {
            "target": settings.labels is not None,
            "logits": settings.logits,
            "top_classes": settings.top_k > 0,
            "embeddings": settings.embeddings,
        }
    for column, here in wanted.items():
        there = any(name == column or name.startswith(f"{column}_") for name in names)
        if names and there != here:
            raise InputError(
                f"{file} is complete, {'with' if there else 'without'} {column}, which this "
                f"command {'leaves out' if there else 'asks for'}: give the options that it was "
                "made with, or replace it with `overwrite=True`"
            )


def _names(file: Path) -> list[str]:
    """Return the names of the columns; none if no row says them."""
    ending = file.suffix.lower()
    try:
        if ending == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(file).names)
        with file.open(encoding="utf-8", newline="") as lines:
            if ending == ".csv":
                return next(csv.reader(lines), [])
            return list(json.loads(lines.readline() or "{}"))
    except ImportError:
        return []  # without pyarrow nothing can be told
    except (ValueError, OSError, TypeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
