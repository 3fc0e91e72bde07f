"""What an unfinished run was asked for: ``run.json``, from which ``resume`` goes on alone.

The file is the first that a run writes, so that whatever a kill leaves is known as a run's, and the
last that it removes but for its state. It needs no PyTorch to be read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fastadapt.config import AdaptConfig
from fastadapt.errors import InputError
from fastadapt.files import read_json, write_json
from fastadapt.train.config import TrainConfig
from fastadapt.train.fold_settings import FoldSettings

REQUEST = "run.json"
RESULTS, FOLDS = "results.json", "folds.json"  # of one run, and of several
FORMAT, FORMAT_VERSION = "fastadapt-run", 1


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`fastadapt.train.run.train` that decide the result.

    Attributes:
        data: the data set's absolute path.
        backbone: timm's name; None for a module, which must be given again.
        config, adapt_config, preprocess, pretrained, weights, skip_unreadable: as for ``train``.
        init: absolute path of the run whose adapter training starts from.
        folds: of :func:`fastadapt.train.cross_validation.train_folds`; None for one run.
    """

    data: str
    backbone: str | None
    config: TrainConfig = field(default_factory=TrainConfig)
    adapt_config: AdaptConfig | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    weights: str | None = None
    skip_unreadable: bool = False
    init: str | None = None
    folds: FoldSettings | None = None

    def write(self, out: Path) -> None:
        """Write the request to a run folder."""
        adapt = None if self.adapt_config is None else self.adapt_config.to_dict()
        folds = None if self.folds is None else asdict(self.folds)
        values = {**vars(self), "config": asdict(self.config), "adapt_config": adapt}
        values["folds"] = folds
        write_json(out / REQUEST, {"format": FORMAT, "version": FORMAT_VERSION, **values})

    @classmethod
    def read(cls, out: Path) -> Self:
        """Read what an unfinished run was asked for.

        Raises:
            InputError: there is no request, or it is damaged or of a newer version.
        """
        if not (out / REQUEST).is_file():
            raise InputError(
                f"{out} does not say how it was started: name the data, the backbone and the "
                "settings again"
            )
        values = read_json(out / REQUEST)
        if not is_request(out / REQUEST) or values.get("version") != FORMAT_VERSION:
            raise InputError(f"{out / REQUEST} is none that this version of fastadapt can read")
        types = {"data": str, "preprocess": dict, "pretrained": bool, "skip_unreadable": bool}
        for key, kind in types.items():
            if type(values.get(key)) is not kind:
                raise InputError(f"{out / REQUEST}: {key} is {values.get(key)!r}")
        for key in ("backbone", "weights", "init"):
            if not isinstance(values.get(key), str | None):
                raise InputError(f"{out / REQUEST}: {key} is {values[key]!r}")
        adapt, folds = values.get("adapt_config"), values.get("folds")
        where = str(out / REQUEST)
        return cls(
            values["data"],
            values.get("backbone"),
            TrainConfig.from_dict(values.get("config"), f"{where}, config"),
            None if adapt is None else AdaptConfig.from_dict(adapt, f"{where}, adapt_config"),
            values["preprocess"],
            values["pretrained"],
            values.get("weights"),
            values["skip_unreadable"],
            values.get("init"),
            None if folds is None else FoldSettings.from_dict(folds, f"{where}, folds"),
        )


def is_request(path: Path) -> bool:
    """Say whether a file is a request, by its format."""
    try:
        return read_json(path).get("format") == FORMAT
    except InputError:
        return False


def is_finished(out: Path) -> bool:
    """Say whether a folder holds a run that has ended, or folds that have: without a request."""
    if (out / REQUEST).exists():
        return False
    if (out / FOLDS).is_file():
        return read_json(out / FOLDS).get("finished") is True
    return (out / RESULTS).is_file()
