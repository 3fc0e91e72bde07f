"""Train GDPL from files with upstream's loop and a DataLoader, as the paper's code does.

The layers are those of ``fastadapt.gdpl`` as containers of weights; every step is upstream's
(:class:`fastadapt.bench.upstream.GDPLLoop`): one pass of the text branch per image, over all
classes at the whole context length. ``profile.json`` in ``--out`` holds the seconds of each phase.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from ..upstream import GDPLLoop
from .image_classifier import Clock, Images, autocast


def main() -> None:
    """Run the page."""
    clock = Clock()
    parser = argparse.ArgumentParser(description="Train GDPL with upstream's loop.")
    parser.add_argument("data")
    parser.add_argument("--out", required=True)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--encoder-weights", required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--shots", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    run(parser.parse_args(), clock)


def run(args: argparse.Namespace, clock: Clock) -> None:
    """Train, test and write ``profile.json``."""
    import open_clip

    from fastadapt.gdpl import GDPLConfig, GDPLModel
    from fastadapt.gdpl.clip import text_tower

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    clip, _, transform = open_clip.create_model_and_transforms(args.clip)
    encoder: Any = timm.create_model(
        args.encoder, num_classes=0, checkpoint_path=args.encoder_weights
    )
    train, test = (Images(Path(args.data), split, transform) for split in ("train", "test"))
    config = GDPLConfig(depth=args.depth, rank_depth=args.depth)
    names = train.classes
    model = GDPLModel(clip, encoder.num_features, names, config).to(device)
    encoder.to(device).eval()
    tower: Any = text_tower(clip)
    length = tower.positional_embedding.shape[0]
    texts = [config.template.format(name) for name in names]
    loop = GDPLLoop(model, open_clip.tokenize(texts, length).to(device))
    few = _few(train, args.shots)
    options = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    batches = DataLoader(few, 4, shuffle=True, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0035, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    clock.lap("start", wait=True)

    for _ in range(args.epochs):
        model.train()
        for images, labels in clock.batches(batches, "stage1"):
            images, labels = images.to(device), labels.to(device)
            with autocast(device):
                with torch.no_grad():
                    features = encoder(images)
                loss = F.cross_entropy(loop(images, features).float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        clock.lap("stage1", wait=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.save({k: v for k, v in model.state_dict().items() if "clip" not in k}, out / "model.pt")
    clock.lap("saving")

    model.eval()
    right = torch.zeros((), device=device)
    for images, labels in clock.batches(DataLoader(test, 32, **options), "validation"):
        images = images.to(device)
        with torch.no_grad(), autocast(device):
            logits = loop(images, encoder(images))
        right += (logits.argmax(dim=1) == labels.to(device)).sum()
    accuracy = float(right) / len(test)
    clock.lap("validation", wait=True)
    clock.write(out / "profile.json", accuracy=accuracy)


def _few(images: Images, shots: int) -> Subset:
    """Return ``shots`` images of each class."""
    chosen = []
    for name in images.classes:
        rows = [index for index, row in enumerate(images.rows) if row["label"] == name]
        chosen += random.Random(0).sample(rows, min(shots, len(rows)))
    return Subset(images, chosen)


if __name__ == "__main__":
    main()
