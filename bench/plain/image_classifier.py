"""Train CLAdapter in two stages with plain PyTorch and timm, as users write it in a page.

Stage 1 trains adapter and head on the frozen backbone; with ``--cache`` the features are computed
once and kept on the device. Stage 2 trains everything from the best epoch of stage 1. The script
imports nothing of fastadapt; ``profile.json`` in ``--out`` holds the seconds of each phase.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

STARTED = "BENCH_STARTED"  # environment variable: when this process was started


class Clock:
    """Add up wall time by phase, from the start of the process on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since = self.began = float(os.environ.get(STARTED, time.time()))

    def lap(self, phase: str, wait: bool = False) -> None:
        """Count the time since the last lap for a phase, after the GPU is done with ``wait``."""
        if wait and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now

    def batches(self, loader: Iterable, phase: str) -> Iterator[Any]:
        """Yield batches: waiting for them is ``decode``, what is done with them is ``phase``."""
        iterator = iter(loader)
        while True:
            batch = next(iterator, None)
            self.lap("decode")
            if batch is None:
                return
            yield batch
            self.lap(phase)

    def write(self, path: Path, **others: float) -> None:
        """Write the seconds of each phase, their sum, and other figures."""
        total = time.time() - self.began
        path.write_text(json.dumps({**self.seconds, "total": total, **others}))


class Images(Dataset):
    """The images of one split of a CSV with path, label and split."""

    def __init__(self, data: Path, split: str, transform: Any):
        with data.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.classes = sorted({row["label"] for row in rows})
        self.rows = [row for row in rows if row["split"] == split]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        with Image.open(row["path"]) as image:
            return self.transform(image.convert("RGB")), self.classes.index(row["label"])


class ClusterAttention(nn.Module):
    """Cluster attention in channel mode, as in the paper's code."""

    def __init__(self, dim: int, rank: int, centers: int = 20):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(dim, centers))
        self.transforms = nn.Parameter(torch.randn(centers, rank, rank))
        self.down = nn.Linear(dim, rank)
        self.up = nn.Linear(rank, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, C] to [B, N, C]."""
        q = F.normalize(x.mean(dim=1), dim=-1)
        a = (q @ F.normalize(self.centers, dim=0)).softmax(dim=-1)
        mixed = (a[:, :, None, None] * self.transforms).sum(dim=1)
        return self.up(self.down(x) @ mixed)


class Adapter(nn.Module):
    """Two norms around one block of cluster attention and MLP."""

    def __init__(self, dim: int, rank: int, mlp_ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = ClusterAttention(dim, rank)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, C] to [B, N, C]."""
        x = self.attention(self.ln_1(self.norm1(x)))
        return self.norm2(x + self.mlp(self.ln_2(x)))


class Classifier(nn.Module):
    """A convolutional backbone of timm's, the adapter after it, and a head."""

    def __init__(self, backbone: nn.Module, classes: int, rank: int):
        super().__init__()
        self.backbone: Any = backbone
        dim = self.backbone.num_features
        self.adapter, self.head = Adapter(dim, rank), nn.Linear(dim, classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to tokens [B, N, C]."""
        return self.backbone.forward_features(images).flatten(2).transpose(1, 2)

    def classify(self, features: Tensor) -> Tensor:
        """Map tokens [B, N, C] to logits [B, classes]."""
        return self.head(self.adapter(features).mean(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, classes]."""
        return self.classify(self.features(images))


class Cached:
    """Batches of features that are on the device, shuffled on request."""

    def __init__(self, features: Tensor, labels: Tensor, batch_size: int, shuffle: bool):
        self.features, self.labels = features, labels
        self.batch_size, self.shuffle = batch_size, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self.labels), self.labels.device
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for rows in order.to(device).split(self.batch_size):
            yield self.features[rows], self.labels[rows]


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return bf16 autocast on a GPU, nothing on a CPU."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16)


class Training:
    """One run: loaders, model and clock, and what is done with them."""

    def __init__(self, args: argparse.Namespace, clock: Clock):
        self.args, self.clock = args, clock
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        backbone = timm.create_model(args.backbone, num_classes=0, checkpoint_path=args.weights)
        config = timm.data.resolve_data_config({}, model=backbone)
        size = (3, args.image_size, args.image_size)
        config |= {"input_size": size, "crop_pct": 1.0}
        transform = timm.data.create_transform(**config)
        self.loaders = {split: self.loader(split, transform) for split in ("train", "val", "test")}
        classes = len(self.loaders["train"].dataset.classes)
        self.model = Classifier(backbone, classes, args.rank).to(self.device)
        self.best = Path(args.out) / "best.pt"
        self.best_accuracy = -1.0

    def loader(self, split: str, transform: Any) -> Any:
        """Return a loader whose worker processes decode."""
        return DataLoader(
            Images(Path(self.args.data), split, transform),
            self.args.batch_size,
            shuffle=split == "train",
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.args.workers > 0,
        )

    def cache(self) -> dict[str, Any]:
        """Return loaders of features that are computed once."""
        self.model.eval()
        found = {}
        for split, loader in self.loaders.items():
            features, labels = [], []
            for images, targets in self.clock.batches(loader, "features"):
                with torch.no_grad(), autocast(self.device):
                    tokens = self.model.features(images.to(self.device, non_blocking=True))
                features.append(tokens)
                labels.append(targets.to(self.device))
            shuffled = split == "train"
            self.clock.lap("features", wait=True)
            found[split] = Cached(
                torch.cat(features), torch.cat(labels), self.args.batch_size, shuffled
            )
        return found

    def stage(self, number: int, epochs: int, lr: float, loaders: dict[str, Any]) -> None:
        """Train for some epochs, and keep the best in ``best.pt``."""
        model, phase = self.model, f"stage{number}"
        frozen = number == 1
        model.backbone.requires_grad_(not frozen)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            model.train()
            if frozen:
                model.backbone.eval()
            for inputs, targets in self.clock.batches(loaders["train"], phase):
                with autocast(self.device):
                    logits = self.logits(inputs, frozen)
                    loss = F.cross_entropy(logits, targets.to(self.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()
            self.clock.lap(phase, wait=True)
            accuracy = self.accuracy(loaders["val"])
            if accuracy >= self.best_accuracy:
                self.best_accuracy = accuracy
                torch.save(model.state_dict(), self.best)
            self.clock.lap("saving")

    def logits(self, inputs: Tensor, frozen: bool) -> Tensor:
        """Classify images or features, without a graph through a frozen backbone."""
        inputs = inputs.to(self.device, non_blocking=True)
        if inputs.ndim == 3:
            return self.model.classify(inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.model.features(inputs)
        return self.model.classify(features)

    @torch.no_grad()
    def accuracy(self, loader: Any) -> float:
        """Return the share of right predictions."""
        self.model.eval()
        right, count = torch.zeros((), device=self.device), 0
        for inputs, targets in self.clock.batches(loader, "validation"):
            with autocast(self.device):
                logits = self.logits(inputs, True)
            right += (logits.argmax(dim=1) == targets.to(self.device)).sum()
            count += len(targets)
        share = float(right) / count
        self.clock.lap("validation", wait=True)
        return share

    def run(self) -> None:
        """Train both stages, test the best weights, and write ``profile.json``."""
        args, out = self.args, Path(self.args.out)
        out.mkdir(parents=True, exist_ok=True)
        self.clock.lap("start", wait=True)
        cached = self.cache() if args.cache else self.loaders
        self.stage(1, args.epochs, args.lr, cached)
        self.model.load_state_dict(torch.load(self.best, weights_only=True))
        self.clock.lap("saving", wait=True)
        if args.epochs2:
            self.stage(2, args.epochs2, args.lr2, self.loaders)
            self.model.load_state_dict(torch.load(self.best, weights_only=True))
        self.clock.lap("saving", wait=True)
        accuracy = self.accuracy(self.loaders["test"])
        self.clock.write(out / "profile.json", accuracy=accuracy)


def main() -> None:
    """Run the page."""
    clock = Clock()
    parser = argparse.ArgumentParser(description="Train CLAdapter with plain PyTorch and timm.")
    parser.add_argument("data")
    parser.add_argument("--out", required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--epochs2", type=int, required=True)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr2", type=float, default=1e-5)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--cache", action="store_true")
    Training(parser.parse_args(), clock).run()


if __name__ == "__main__":
    main()
