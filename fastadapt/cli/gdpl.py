"""The command ``fastadapt gdpl``."""

from __future__ import annotations

from fastadapt.cli.options import Given, command
from fastadapt.cli.resume import how_to_continue
from fastadapt.errors import InputError
from fastadapt.gdpl.config import FrozenParts, GDPLConfig, GDPLRunSettings, GDPLTrainConfig
from fastadapt.processes import check_one_process
from fastadapt.train.config import RecipeChoice, RunSettings

OF_AN_ENCODER = ("domain_encoder", "domain_weights", "domain_size", "domain_normalization")


@command(
    RunSettings,
    FrozenParts,
    GDPLConfig,
    RecipeChoice,
    GDPLTrainConfig,
    GDPLRunSettings,
    clip=None,
    clip_weights=None,
    domain_encoder=None,
)
def gdpl(given: Given) -> None:
    """Train domain prompts for a frozen CLIP model on a few labelled images per class (GDPL)."""
    run, paper = given.build(RunSettings), given.values["recipe"] == "paper"
    _check(given)
    if paper:
        classes = given.values["train_classes"]
        what = given.build(GDPLRunSettings, GDPLRunSettings.paper())
        config = given.build(GDPLTrainConfig, GDPLTrainConfig.paper(classes))
        gdpl_config = given.build(GDPLConfig, GDPLConfig.paper(classes))
    else:
        what, config = given.build(GDPLRunSettings), given.build(GDPLTrainConfig)
        depth = "low_rank_depth" if "low_rank_depth" in given.names else "prompt_depth"
        gdpl_config = given.build(GDPLConfig, rank_depth=given.values[depth])

    check_one_process("GDPL")
    from fastadapt.gpu_start import begin_context
    from fastadapt.no_compiler import leave_compiler_out

    begin_context(run.device)
    leave_compiler_out()
    from fastadapt.gdpl import GDPLSource, train_gdpl
    from fastadapt.gdpl.domain_features import FeatureTable
    from fastadapt.gdpl.evaluate import result_table

    parts = given.fields(FrozenParts)
    features = None if what.domain_features is None else FeatureTable.read(what.domain_features)
    if features is not None:
        parts["domain_encoder"] = features.width
    with how_to_continue(run.out, run.overwrite):
        results = train_gdpl(
            run.dataset,
            run.out,
            GDPLSource(**parts),
            config,
            gdpl_config,
            seeds=what.seeds,
            deviation=what.deviation,
            eval_data=what.eval_data,
            names_file=what.names_file,
            domain_features=features,
            device=run.device,
            workers=run.workers,
            skip_unreadable=run.skip_unreadable,
            resume=run.resume,
            overwrite=run.overwrite,
            quiet=run.quiet,
            profile=what.profile,
        )
    if not run.quiet:
        from rich.console import Console

        Console(markup=False).print(result_table(results))


def _check(given: Given) -> None:
    """Refuse options that are missing, or that exclude each other."""
    if given.values["clip"] is None:
        raise InputError("gdpl needs --clip NAME, open_clip's name of a CLIP model")
    if given.values["domain_features"] is not None:
        for name in OF_AN_ENCODER:
            if name in given.names:
                raise InputError(
                    f"--domain-features is instead of an encoder: leave out {given.flag(name)}"
                )
    elif given.values["domain_encoder"] is None:
        raise InputError(
            "gdpl needs --domain-encoder NAME, timm's name of a model that knows the domain, or "
            "--domain-features FILE"
        )
