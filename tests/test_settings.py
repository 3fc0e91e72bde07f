"""Settings are declared once: typed and bounded, in Python and in files."""

import dataclasses
import subprocess
import sys
import typing
from typing import Annotated

import numpy as np
import pytest

from fastadapt.config import AdaptConfig, LoRAConfig
from fastadapt.errors import InputError
from fastadapt.export.predict.settings import EmbedSettings, PredictSettings, WorkSettings
from fastadapt.export.settings import (
    Batches,
    BundleSettings,
    EngineSettings,
    ModelSettings,
    TargetSettings,
    VerifySettings,
)
from fastadapt.gdpl.config import FrozenParts, GDPLConfig, GDPLRunSettings, GDPLTrainConfig
from fastadapt.settings import Setting, Settings, declared, validated
from fastadapt.train.config import (
    BackboneSource,
    ImageSettings,
    RunSettings,
    SavingSettings,
    TrainConfig,
)
from fastadapt.train.fold_settings import FoldSettings
from fastadapt.train.search_config import SearchConfig

GROUPS = [
    AdaptConfig,
    BackboneSource,
    Batches,
    BundleSettings,
    EngineSettings,
    FrozenParts,
    GDPLConfig,
    GDPLRunSettings,
    GDPLTrainConfig,
    ImageSettings,
    LoRAConfig,
    ModelSettings,
    RunSettings,
    SavingSettings,
    TargetSettings,
    TrainConfig,
    VerifySettings,
]


@dataclasses.dataclass(frozen=True)
class Example(Settings):
    """An example."""

    size: Annotated[int, Setting("Size of it.", ge=1, limit=1000)] = 1
    share: Annotated[float | None, Setting("Share of it.", gt=0, le=1)] = None
    shape: Annotated[tuple[int, ...], Setting("Shape of it.", expected="numbers")] = (1,)
    rate: Annotated[float, Setting("Rate of it.", gt=0)] = 1.0

    def check_together(self):
        if self.size == 13:
            raise InputError("size is 13; expected luck")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 0}, "size is 0; expected at least 1"),
        ({"size": 1001}, "size is 1001; expected at most 1,000"),
        ({"size": True}, "size is True; expected a whole number, at least 1"),
        ({"size": "3"}, "size is '3'; expected a whole number, at least 1"),
        ({"size": 1.5}, "size is 1.5; expected a whole number, at least 1"),
        ({"size": None}, "size is None; expected a whole number, at least 1"),
        ({"share": float("nan")}, "share is nan; expected more than 0, at most 1"),
        ({"share": float("inf")}, "share is inf; expected more than 0, at most 1"),
        ({"rate": float("inf")}, "rate is inf; expected a finite number, more than 0"),
        ({"share": False}, "share is False; expected a number, more than 0, at most 1"),
        ({"shape": ["a"]}, "shape is ('a',); expected numbers"),
        ({"size": 13}, "size is 13; expected luck"),
    ],
)
def test_values_that_do_not_fit(values, says):
    with pytest.raises(InputError) as error:
        Example(**values)
    assert str(error.value) == says
    with pytest.raises(InputError) as error:
        Example.from_dict(values, "config.json")
    assert str(error.value) == f"config.json: {says}"


@pytest.mark.parametrize("values", [[], "text", 3, None])
def test_files_that_hold_something_else(values):
    with pytest.raises(InputError, match=r"config\.json is .*; expected a JSON object"):
        Example.from_dict(values, "config.json")


def test_unknown_and_missing_keys():
    with pytest.raises(InputError, match=r"config\.json has 'colour', which this version"):
        Example.from_dict({"colour": 1}, "config.json")
    with pytest.raises(InputError, match="the FrozenParts lacks 'clip'"):
        FrozenParts.from_dict({"clip_weights": None, "domain_encoder": 3})


def test_values_become_plain():
    made = Example(np.int64(3), 1, [1, np.int32(2)])
    assert made == Example(3, 1.0, (1, 2))
    assert type(made.size) is int and type(made.share) is float and type(made.shape[1]) is int
    assert Example.from_dict(made.to_dict()) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.size = 4


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_is_explained_in_a_whole_phrase(group):
    for field in declared(group):
        assert field.setting.help[0].isalpha() or field.setting.help[0] == "["
        assert field.setting.help.endswith(".") and len(field.setting.help) > 10, field.name
        assert f"    {field.name}: {field.setting.help}" in group.__doc__


@pytest.mark.parametrize("group", GROUPS)
def test_defaults_fit_their_own_declaration(group):
    given = {
        "data": "d",
        "out": "o",
        "bundle": "b",
        "clip": "c",
        "clip_weights": None,
        "domain_encoder": 3,
    }
    names = {field.name for field in declared(group) if field.default is dataclasses.MISSING}
    values = {name: given[name] for name in names & set(given)}
    if group in (RunSettings, VerifySettings):
        with pytest.raises(InputError, match=r"(data|bundle) is '[db]'; expected Path"):
            group(**values)
    else:
        made = group(**values)
        assert validated(group, vars(made)) == vars(made)


@pytest.mark.parametrize(
    ("group", "values"),
    [
        (AdaptConfig, {"rank": 10**12}),
        (AdaptConfig, {"num_centers": -1}),
        (AdaptConfig, {"mlp_ratio": float("nan")}),
        (AdaptConfig, {"depth": 1e3}),
        (AdaptConfig, {"input_size": [3, 10**9, 1]}),
        (AdaptConfig, {"lora": {"r": 10**9}}),
        (AdaptConfig, {"lora": {"rank_pattern": {"qkv": 0}}}),
        (AdaptConfig, {"lora": {"rank_pattern": {"(": 4}}}),
        (AdaptConfig, {"lora": {"alpha_pattern": {"q" * 1000: 4}}}),
        (AdaptConfig, {"lora": []}),
        (GDPLConfig, {"hidden": 10**12}),
        (GDPLConfig, {"n_ctx": 2.5}),
        (FrozenParts, {"clip": 3, "clip_weights": None, "domain_encoder": 3}),
        (TrainConfig, {"lr": True}),
        (TrainConfig, {"seed": 2**64}),
    ],
)
def test_damaged_files_are_refused_before_anything_is_made(group, values):
    with pytest.raises(InputError) as error:
        group.from_dict(values)
    assert "\n" not in str(error.value)


def test_declarations_import_nothing_heavy():
    code = (
        "import fastadapt.config, fastadapt.train.config, fastadapt.gdpl.config, "
        "fastadapt.export.settings, sys; "
        "print([m for m in ('torch', 'timm', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_number_has_an_end():
    """A number that is far beyond use is a slip or a damaged file: it is named, not tried."""
    for group in [
        *GROUPS,
        FoldSettings,
        SearchConfig,
        PredictSettings,
        EmbedSettings,
        WorkSettings,
    ]:
        for field in declared(group):
            kinds = {field.kind, *typing.get_args(field.kind)}
            if {int, float} & kinds and str not in kinds:
                setting = field.setting
                ends = (setting.le, setting.lt, setting.limit)
                container = typing.get_origin(field.kind) in (tuple, dict)
                assert container or any(end is not None for end in ends), (group, field.name)


@pytest.mark.parametrize(
    ("group", "values", "says"),
    [
        (TrainConfig, {"val_fraction": 1e-9}, "val_fraction is 1e-09; expected at least 0.001"),
        (
            TrainConfig,
            {"val_fraction": 1.0},
            "val_fraction is 1.0; expected at least 0.001, less than 1",
        ),
        (TrainConfig, {"lr": 1e30}, r"lr is 1e\+30; expected at most"),
        (TrainConfig, {"patience": 10**30}, "patience is 10000.*; expected at most"),
        (ImageSettings, {"image_size": 1}, "image_size is 1; expected at least 8"),
        (ImageSettings, {"crop_pct": 1e-9}, "crop_pct is 1e-09; expected 0.01 to 1"),
        (SearchConfig, {"trials": 0}, "trials is 0; expected 1 to 1,000,000"),
        (GDPLTrainConfig, {"warmup_epochs": 1e30}, "warmup_epochs is 1e"),
    ],
)
def test_numbers_that_make_no_sense(group, values, says):
    with pytest.raises(InputError, match=says):
        group(**values)
