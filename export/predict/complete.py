"""Tell whether results that are complete are those that a command asks for.

Results of this version have a file beside them that names the model, the options and the images;
of others only the columns tell.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastadapt.errors import InputError

from .parts import Parts, difference
from .settings import EmbedSettings, PredictSettings

if TYPE_CHECKING:
    from .request import Request
    from .sources import ImageList


def check_complete(request: Request, parts: Parts, images: ImageList) -> str:
    """Refuse complete results of another model, with other columns or of other images.

    Args:
        request: of the command that would go on with them.
        parts: of the results.
        images: that the command names.

    Returns:
        A line for the terminal: there is nothing to do, and whether that could be told.

    Raises:
        InputError: naming what differs.
    """
    file = parts.file
    check_columns(request.settings, file)
    said = f"{file} is there, and complete: there is nothing to resume"
    before = parts.made_by()
    if before is None:
        return (
            f"{said}. Nothing beside it tells of which model and images it was made: if in doubt, "
            "make it again with --overwrite"
        )
    remedy = "give the same, replace it with `overwrite=True`, or choose another `out`"
    if found := difference(before, request.identity):
        raise InputError(f"{file} is complete, and was made with another {found}: {remedy}")
    noted = before.get("model")
    if isinstance(noted, dict):  # complete rows may be of any file of a bundle, and any device
        noted = {key: value for key, value in noted.items() if key not in ("file", "runtime")}
    if found := difference({"model": noted}, {"model": request.model_identity()}):
        raise InputError(f"{file} is complete, and was made with another {found}: {remedy}")
    if found := difference(before, {"images": images.digest().to_dict()}):
        raise InputError(f"{file} is complete, and was made of other {found}: {remedy}")
    return said


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
