"""The command ``fastadapt train``: its options, and nothing else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

MODEL, TRAINING, IMAGES, RUN = "Model", "Training", "Images and features", "Run"
GDPL = "GDPL (--method gdpl)"


def train(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder of class folders, one with train/, val/ (and test/) of such folders, or "
            "a CSV with path, label and optionally split (train, val, test).",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run folder.", rich_help_panel=RUN)],
    method: Annotated[
        Literal["adapter", "gdpl"],
        typer.Option(
            help="An adapter behind a backbone, or prompts in a CLIP model.", rich_help_panel=MODEL
        ),
    ] = "adapter",
    backbone: Annotated[
        str | None, typer.Option(help="timm's name of the backbone.", rich_help_panel=MODEL)
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Local file of the backbone's weights.", rich_help_panel=MODEL),
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option(help="Start from timm's weights, or random ones.", rich_help_panel=MODEL),
    ] = True,
    adapter: Annotated[
        Literal["cladapter", "none"],
        typer.Option(help="none: the head alone, a linear probe.", rich_help_panel=MODEL),
    ] = "cladapter",
    depth: Annotated[int, typer.Option(help="Blocks.", rich_help_panel=MODEL)] = 1,
    centers: Annotated[int, typer.Option(help="Cluster centers.", rich_help_panel=MODEL)] = 20,
    rank: Annotated[
        int, typer.Option(help="Width of the transforms, in channels.", rich_help_panel=MODEL)
    ] = 256,
    mlp_ratio: Annotated[
        float, typer.Option(help="MLP's hidden width over the channels.", rich_help_panel=MODEL)
    ] = 4.0,
    mode: Annotated[
        Literal["channel", "token"],
        typer.Option(help="What the adapter mixes.", rich_help_panel=MODEL),
    ] = "channel",
    lora_rank: Annotated[
        int, typer.Option(help="LoRA in the backbone; 0: none.", rich_help_panel=MODEL)
    ] = 0,
    lora_alpha: Annotated[
        float, typer.Option(help="Scales LoRA by alpha / rank.", rich_help_panel=MODEL)
    ] = 16.0,
    lora_parts: Annotated[
        str, typer.Option(help="Which of q, k and v get LoRA.", rich_help_panel=MODEL)
    ] = "qkv",
    stages: Annotated[
        int,
        typer.Option(help="1: backbone frozen; 2: then all of it.", rich_help_panel=TRAINING),
    ] = 1,
    epochs: Annotated[
        int, typer.Option(help="Of stage 1 (gdpl: 15).", rich_help_panel=TRAINING)
    ] = 30,
    lr: Annotated[
        float,
        typer.Option(
            help="Peak learning rate of stage 1 (gdpl: 0.0035).", rich_help_panel=TRAINING
        ),
    ] = 1e-3,
    batch_size: Annotated[
        int, typer.Option(help="In images (gdpl: 4).", rich_help_panel=TRAINING)
    ] = 32,
    epochs2: Annotated[int, typer.Option(help="Of stage 2.", rich_help_panel=TRAINING)] = 10,
    lr2: Annotated[
        float, typer.Option(help="Peak learning rate of stage 2.", rich_help_panel=TRAINING)
    ] = 1e-5,
    batch_size2: Annotated[
        int | None,
        typer.Option(help="In stage 2. (default: --batch-size)", rich_help_panel=TRAINING),
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "adam", "sgd"],
        typer.Option(help="gdpl: sgd, or adamw.", rich_help_panel=TRAINING),
    ] = "adamw",
    weight_decay: Annotated[
        float,
        typer.Option(help="Of matrices only (gdpl: of all, 0.0005).", rich_help_panel=TRAINING),
    ] = 0.01,
    warmup_epochs: Annotated[
        float, typer.Option(help="Of each stage; cosine after.", rich_help_panel=TRAINING)
    ] = 1.0,
    clip_grad: Annotated[
        float | None,
        typer.Option(help="Largest gradient norm. (default: no limit)", rich_help_panel=TRAINING),
    ] = None,
    label_smoothing: Annotated[
        float, typer.Option(help="0 up to 1.", rich_help_panel=TRAINING)
    ] = 0.0,
    class_weights: Annotated[
        Literal["none", "balanced"],
        typer.Option(help="balanced: by inverse class frequency.", rich_help_panel=TRAINING),
    ] = "none",
    amp: Annotated[
        Literal["auto", "off", "bf16", "fp16"],
        typer.Option(help="Mixed precision; auto: on a GPU.", rich_help_panel=TRAINING),
    ] = "auto",
    cuda_graph: Annotated[
        Literal["auto", "off"],
        typer.Option(help="Replay steps as CUDA graphs; auto: on a GPU.", rich_help_panel=TRAINING),
    ] = "auto",
    select: Annotated[
        Literal["macro_f1", "accuracy", "loss"],
        typer.Option(help="Validation metric of the kept epoch.", rich_help_panel=TRAINING),
    ] = "macro_f1",
    patience: Annotated[
        int | None,
        typer.Option(
            help="Epochs without improvement that end a stage. (default: no limit)",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything.", rich_help_panel=TRAINING)] = 0,
    val_fraction: Annotated[
        float,
        typer.Option(help="Drawn from train if DATA gives no val.", rich_help_panel=IMAGES),
    ] = 0.2,
    skip_unreadable: Annotated[
        bool,
        typer.Option("--skip-unreadable", help="Leave damaged images out.", rich_help_panel=IMAGES),
    ] = False,
    image_size: Annotated[
        int | None,
        typer.Option(help="In pixels. (default: the backbone's)", rich_help_panel=IMAGES),
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            help="Share of the resized image that is kept. (default: the backbone's)",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    crop_mode: Annotated[
        Literal["center", "squash", "border"] | None,
        typer.Option(help="Default: the backbone's.", rich_help_panel=IMAGES),
    ] = None,
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos"] | None,
        typer.Option(help="Default: the backbone's.", rich_help_panel=IMAGES),
    ] = None,
    augment: Annotated[
        Literal["none", "flips", "dihedral", "crops"],
        typer.Option(
            help="Random views; dihedral: the square's symmetries (gdpl: crops).",
            rich_help_panel=IMAGES,
        ),
    ] = "none",
    views: Annotated[
        int,
        typer.Option(
            help="Cached views of a training image, the plain one first.", rich_help_panel=IMAGES
        ),
    ] = 1,
    cache: Annotated[
        bool,
        typer.Option(help="Keep the frozen backbone's features on disk.", rich_help_panel=IMAGES),
    ] = True,
    feature_dtype: Annotated[
        Literal["auto", "fp16", "fp32"],
        typer.Option(help="Of the cache; auto: fp16 where it suffices.", rich_help_panel=IMAGES),
    ] = "auto",
    clip: Annotated[
        str | None,
        typer.Option(help="open_clip's name, ViT-B-16 or local-dir:….", rich_help_panel=GDPL),
    ] = None,
    clip_weights: Annotated[
        str | None, typer.Option(help="open_clip's tag, or a local file.", rich_help_panel=GDPL)
    ] = None,
    domain_encoder: Annotated[
        str | None,
        typer.Option(help="timm's name of a model that knows the domain.", rich_help_panel=GDPL),
    ] = None,
    domain_weights: Annotated[
        Path | None,
        typer.Option(help="Local file of its weights. (default: timm's)", rich_help_panel=GDPL),
    ] = None,
    domain_features: Annotated[
        Path | None,
        typer.Option(
            help="Instead of an encoder: a safetensors file, one vector per image, by its path.",
            rich_help_panel=GDPL,
        ),
    ] = None,
    domain_size: Annotated[
        int | None,
        typer.Option(help="Pixels of its images. (default: its own)", rich_help_panel=GDPL),
    ] = None,
    domain_normalization: Annotated[
        Literal["clip", "own"],
        typer.Option(help="Of its images; clip: as in the paper's code.", rich_help_panel=GDPL),
    ] = "clip",
    class_names: Annotated[
        Path | None,
        typer.Option(
            help="JSON from folder names to names in the texts. (default: the folders')",
            rich_help_panel=GDPL,
        ),
    ] = None,
    template: Annotated[
        str, typer.Option(help="Of the texts.", rich_help_panel=GDPL)
    ] = "a photo of a {}.",
    shots: Annotated[
        int, typer.Option(help="Training images per class; 0: all.", rich_help_panel=GDPL)
    ] = 16,
    train_classes: Annotated[
        Literal["base", "all"],
        typer.Option(help="base: half of them; the others are novel.", rich_help_panel=GDPL),
    ] = "base",
    grad_checkpointing: Annotated[
        bool,
        typer.Option(
            "--grad-checkpointing",
            help="Compute layers again in the backward pass: less memory.",
            rich_help_panel=GDPL,
        ),
    ] = False,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(help="Another data set to evaluate; repeatable.", rich_help_panel=GDPL),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="One run each, and their mean: 1,2,3.", rich_help_panel=GDPL)
    ] = "1",
    prompts: Annotated[int, typer.Option(help="Tokens per layer.", rich_help_panel=GDPL)] = 2,
    prompt_depth: Annotated[
        int, typer.Option(help="Layers with prompts and low-rank updates.", rich_help_panel=GDPL)
    ] = 9,
    low_rank: Annotated[int, typer.Option(help="Rank; 0: none.", rich_help_panel=GDPL)] = 4,
    low_rank_alpha: Annotated[
        float, typer.Option(help="Scales updates by alpha / rank.", rich_help_panel=GDPL)
    ] = 1.0,
    noise: Annotated[
        Literal["train", "always", "off"],
        typer.Option(help="On the text prompt; always: random predictions.", rich_help_panel=GDPL),
    ] = "train",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue this run.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=RUN)
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:1.", rich_help_panel=RUN)
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Threads that read images. (default: one per core, at most 8)",
            rich_help_panel=RUN,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Errors only.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Train an adapter for a frozen backbone on labelled images; Ctrl-C, then --resume, is safe."""
    from fastadapt.cli.gdpl import given_options, train_command

    given = given_options(context, GDPL)
    if method == "gdpl":
        with _how_to_continue(out, overwrite):
            train_command(context.params, given)
        return
    from fastadapt.config import AdaptConfig
    from fastadapt.lora import LoRAConfig
    from fastadapt.train.run import TrainConfig, summary_table
    from fastadapt.train.run import train as run_training

    config = TrainConfig(
        stages=stages,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        epochs2=epochs2,
        lr2=lr2,
        batch_size2=batch_size2,
        optimizer=optimizer,
        weight_decay=weight_decay,
        warmup_epochs=warmup_epochs,
        clip_grad=clip_grad,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        amp=amp,
        cuda_graph=cuda_graph,
        select=select,
        patience=patience,
        augment=augment,
        views=views,
        cache=cache,
        feature_dtype=feature_dtype,
        val_fraction=val_fraction,
        seed=seed,
    )
    lora = LoRAConfig(r=lora_rank, alpha=lora_alpha, parts=lora_parts) if lora_rank else None
    adapt_config = AdaptConfig(
        adapter=adapter,
        depth=depth,
        num_centers=centers,
        rank=rank,
        mlp_ratio=mlp_ratio,
        mode=mode,
        lora=lora,
        input_size=None if image_size is None else (3, image_size, image_size),
    )
    with _how_to_continue(out, overwrite):
        result = run_training(
            data,
            out,
            backbone,
            config,
            adapt_config,
            preprocess={
                "crop_pct": crop_pct,
                "crop_mode": crop_mode,
                "interpolation": interpolation,
            },
            pretrained=pretrained,
            weights=weights,
            device=device,
            workers=workers,
            skip_unreadable=skip_unreadable,
            resume=resume,
            overwrite=overwrite,
            quiet=quiet,
        )
    if not quiet:
        from rich.console import Console

        Console().print(summary_table(result))


@contextmanager
def _how_to_continue(out: Path, overwrite: bool) -> Iterator[None]:
    """After Ctrl-C: the command that goes on from there, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        again = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        # GDPL has a folder per seed.
        if any(out.glob("state.safetensors")) or any(out.glob("seed*/state.safetensors")):
            said = "the epochs before this one are kept. Continue"
            again.append("--resume")
        elif any(out.glob("seed*/results.json")) and not overwrite:
            said = "the seeds before this one are kept. Continue"
            again.append("--resume")
        else:
            said = "no epoch was completed. Start again"
            again += ["--overwrite"] if overwrite else []
        print(f"\nfastadapt: interrupted; {said}: fastadapt {shlex.join(again)}", file=sys.stderr)
        raise typer.Exit(130) from None
