"""``fastadapt train --method gdpl``: from options to a run."""

from __future__ import annotations

from typing import Any

import typer

from fastadapt.errors import InputError

RUN_OPTIONS = ("device", "workers", "skip_unreadable", "resume", "overwrite", "quiet")


def given_options(context: typer.Context, gdpl_panel: str) -> set[str]:
    """The names of the options that were given.

    Args:
        context: of the command.
        gdpl_panel: the help panel of GDPL's own options.

    Raises:
        InputError: an option belongs to the other method, or one that the method needs is missing.
    """
    options = context.params
    sources = {name: context.get_parameter_source(name).name for name in options}
    given = {name for name, source in sources.items() if not source.startswith("DEFAULT")}
    panels = {p.name: getattr(p, "rich_help_panel", None) for p in context.command.params}
    gdpl = {name for name in options if panels.get(name) == gdpl_panel}
    method, foreign, needed = options["method"], given & gdpl, ("backbone",)
    if method == "gdpl":
        from fastadapt.gdpl import GDPLTrainConfig

        shared = {"data", "out", "method", *RUN_OPTIONS, *GDPLTrainConfig.__dataclass_fields__}
        encoder = "domain_features" if "domain_features" in given else "domain_encoder"
        foreign, needed = given - gdpl - shared, ("clip", encoder)
    for name in sorted(foreign):
        raise InputError(f"{_option(name)} does not belong to --method {method}: leave it out")
    for name in needed:
        if name not in given:
            raise InputError(f"--method {method} needs {_option(name)} NAME")
    return given


def train_command(options: dict[str, Any], given: set[str]) -> None:
    """Trains and prints the table.

    Args:
        options: all of them; those of training that were not given have GDPL's defaults, not the
            adapter's.
        given: names.
    """
    from fastadapt.gdpl import GDPLConfig, GDPLSource, GDPLTrainConfig, train_gdpl
    from fastadapt.gdpl.domain_features import FeatureTable
    from fastadapt.gdpl.evaluate import result_table

    try:
        seeds = tuple(int(seed) for seed in options["seeds"].split(","))
    except ValueError:
        raise InputError(
            f"--seeds is {options['seeds']!r}; expected numbers with commas between, 1,2,3"
        ) from None
    weights, features = options["domain_weights"], options["domain_features"]
    if features is not None:
        for name in ("domain_encoder", "domain_weights", "domain_size", "domain_normalization"):
            if name in given:
                raise InputError(
                    f"--domain-features is instead of an encoder: leave out {_option(name)}"
                )
        features = FeatureTable.read(features)
    source = GDPLSource(
        clip=options["clip"],
        clip_weights=options["clip_weights"],
        domain_encoder=options["domain_encoder"] if features is None else features.width,
        domain_weights=None if weights is None else str(weights.absolute()),
        domain_size=options["domain_size"],
        domain_normalization=options["domain_normalization"],
    )
    config = GDPLTrainConfig(
        **{key: options[key] for key in GDPLTrainConfig.__dataclass_fields__ if key in given}
    )
    gdpl_config = GDPLConfig(
        n_ctx=options["prompts"],
        depth=options["prompt_depth"],
        rank=options["low_rank"],
        alpha=options["low_rank_alpha"],
        rank_depth=options["prompt_depth"],
        noise=options["noise"],
        template=options["template"],
    )
    results = train_gdpl(
        options["data"],
        options["out"],
        source,
        config,
        gdpl_config,
        seeds=seeds,
        eval_data=options["eval_data"] or (),
        names_file=options["class_names"],
        domain_features=features,
        **{name: options[name] for name in RUN_OPTIONS},
    )
    if not options["quiet"]:
        from rich.console import Console

        Console().print(result_table(results))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
