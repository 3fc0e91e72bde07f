import inspect
from dataclasses import replace

import pytest

from fastadapt.cli.train import train
from fastadapt.config import AdaptConfig
from fastadapt.settings import declared
from fastadapt.train.config import BackboneSource, RunSettings, SavingSettings, TrainConfig


def test_the_old_way_to_gdpl_names_the_new_one(command, tmp_path):
    for method in (("--method", "gdpl"), ("--method=gdpl",)):
        args = ("train", tmp_path, "--out", tmp_path / "run", *method, "--clip", "ViT-B-16")
        code, _, err = command(*args)
        assert code == 1 and err.count("\n") == 1
        assert "fastadapt gdpl DATA --clip NAME --domain-encoder NAME --out RUN" in err
    code, _, err = command("train", tmp_path, "--out", tmp_path / "run", "--method", "GDPL")
    assert code == 2 and "is not one of 'adapter', 'gdpl'" in err


def test_the_default_recipe_is_smaller_than_the_papers():
    options = inspect.signature(train).parameters
    assert (options["rank"].default, options["mlp_ratio"].default) == (64, 0.25)
    paper = AdaptConfig()  # in Python the adapter alone is the paper's
    assert (paper.rank, paper.mlp_ratio) == (256, 4.0)
    adapter, head = TrainConfig.default(), TrainConfig.default("head")
    assert (
        adapter == replace(TrainConfig(), refit=True)
        and head.refit
        and head.lr > adapter.lr
        and head.epochs > adapter.epochs
    )
    assert TrainConfig.default("full", epochs=3).full


def test_it_needs_a_backbone(command, tmp_path):
    args = ("train", tmp_path, "--out", tmp_path / "run")
    for method in ((), ("--method", "adapter")):
        code, _, err = command(*args, *method)
        assert code == 1 and "needs --backbone NAME" in err
    assert command(*args, "--shots", 3)[0] == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--epochs", 0), "--epochs is 0; expected at least 1"),
        (("--stages", 3), "--stages is 3; expected 1 or 2"),
        (("--lr", "nan"), "--lr is nan; expected more than 0"),
        (("--centers", 0), "--centers is 0; expected at least 1"),
        (("--lora-rank", -1), "--lora-rank is -1; expected at least 1"),
        (("--lora-parts", "qv", "--lora-rank", 0), "--lora-parts is of LoRA: give --lora-rank"),
        (("--lora-parts", "x", "--lora-rank", 2), "--lora-parts is 'x'; expected some of the"),
        (("--adapter", "none", "--rank", 4), "--rank is of an adapter, and there is none: leave"),
        (("--lr2", 0.1), "--lr2 is of stage 2, and one is trained: give --stages 2, too"),
        (("--epochs2", 3, "--recipe", "paper", "--full"), "--epochs2 is of stage 2"),
        (("--views", 3), "--views is 3, but augment is 'none'"),
        (("--label-smoothing", 1), "--label-smoothing is 1.0; expected 0 or more, less than 1"),
    ],
)
def test_errors_name_the_option(command, tmp_path, more, says):
    args = ("train", tmp_path, "--backbone", "test_vit", "--out", tmp_path / "run", *more)
    code, _, err = command(*args)
    assert code == 1 and err.count("\n") == 1 and says in err


def test_defaults_are_the_functions():
    """``train()`` takes as keywords what the command line declares."""
    from fastadapt.gdpl import train_gdpl
    from fastadapt.train import train as run_training

    for function, group in (
        (run_training, RunSettings),
        (run_training, BackboneSource),
        (run_training, SavingSettings),
        (train_gdpl, RunSettings),
    ):
        parameters = inspect.signature(function).parameters
        for field in declared(group):
            default = parameters[field.name].default
            if default is not inspect.Parameter.empty and field.name != "quiet":
                assert default == field.default, (function, field.name)


OPTIONS = """
    data out method backbone weights pretrained adapter depth centers rank mlp_ratio mode
    lora_rank lora_alpha lora_parts stages epochs lr batch_size epochs2 lr2 batch_size2 optimizer
    weight_decay warmup_epochs clip_grad label_smoothing class_weights amp cuda_graph select
    patience seed val_fraction skip_unreadable image_size crop_pct crop_mode interpolation augment
    views cache feature_dtype resume overwrite device workers quiet
"""


def test_every_option_of_before_is_there():
    assert set(inspect.signature(train).parameters) >= set(OPTIONS.split())
