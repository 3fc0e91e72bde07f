"""Run GDPL from images to a bundle without any download.

The command is ``python -m fastadapt.bench.suites.gdpl_transfer``.

No pretrained CLIP model installs as a package, so a small one is trained from scratch on half of
scikit-learn's digits (scans of handwriting, 8×8) and the English words for them. The other half
becomes another domain: rotated by 35°, pale, blurred and noisy. There GDPL trains on 16 images each
of five of the digits; its accuracy is measured on other images of these five and of the five that
it never saw in that domain, beside the CLIP model alone. The first run is then folded, exported,
verified, and exported once more with all ten words.

This shows that all parts work together. It says nothing about the accuracy that GDPL reaches with a
large CLIP model; domain and learning rate were chosen on these very images.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn

from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_run, verify_bundle
from fastadapt.files import write_json, write_text
from fastadapt.gdpl import GDPLConfig, GDPLSource, GDPLTrainConfig, train_gdpl
from fastadapt.gdpl.evaluate import result_markdown
from fastadapt.info import versions

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32
ENCODER = "test_efficientnet"
TEMPLATES = ("a photo of a {}.", "a scan of a {}.", "the digit {}.", "a picture of the number {}.")
CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"layers": 4, "width": 64, "patch_size": 8, "image_size": SIZE, "head_width": 16},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 4,
    },
}
MEAN = STD = (0.5, 0.5, 0.5)
GDPL = GDPLConfig(depth=3, rank_depth=3)


def main(out: Path, results: Path, seeds: tuple[int, ...]) -> None:
    """Run everything, print what it does, and write ``gdpl-transfer.json`` and ``.md``.

    Args:
        out: the folder for data, models, runs and bundles.
        results: the folder for the tables.
        seeds: the seeds of GDPL's runs.
    """
    from sklearn.datasets import load_digits

    started = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more of them add up in another order: other figures
    digits = load_digits()
    pixels = (digits.images / 16 * 255).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    half = len(order) // 2
    scans = [enlarge(pixels[i]) for i in order]
    labels = digits.target[order]
    write_domain(out / "digits", scans[half:], labels[half:])

    (out / "clip").mkdir(parents=True, exist_ok=True)
    accuracy = train_clip(scans[:half], labels[:half], out / "clip")
    print(f"CLIP model trained; accuracy on held-out plain scans {accuracy:.2%}")
    images = [Image.open(path) for path in sorted((out / "digits" / "train").rglob("*.png"))]
    rotations = train_encoder(images, out / "clip" / "encoder.safetensors")
    print(f"domain encoder trained; it tells rotations with accuracy {rotations:.2%}")

    source = GDPLSource(
        f"local-dir:{out / 'clip'}",
        None,
        ENCODER,
        str(out / "clip" / "encoder.safetensors"),
        domain_size=SIZE,
    )
    config = GDPLTrainConfig(augment="none", epochs=20, lr=0.05)
    found = train_gdpl(
        out / "digits",
        out / "run",
        source,
        config,
        GDPL,
        seeds=seeds,
        overwrite=True,
        quiet=False,
    )
    print(result_markdown(found))

    run = out / "run" / f"seed{seeds[0]}" if len(seeds) > 1 else out / "run"
    exports = {}
    for name, classes in (("base classes", None), ("all ten words", WORDS)):
        bundle = out / f"bundle-{name.split()[0]}"
        made = export_run(run, bundle, class_names=classes, overwrite=True)
        checked = verify_bundle(bundle)
        exports[name] = {
            "fold_error": made.fold_report.max_error,
            "end_to_end_error": max(p.error for p in made.parities if p.stage == "end to end"),
            "verified": checked.passed,
            "onnx_bytes": (bundle / "model.onnx").stat().st_size,
        }
        print(f"exported with {name}: {exports[name]}")
    summary = {
        "command": "python -m fastadapt.bench.suites.gdpl_transfer",
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "clip_accuracy_on_plain_scans": accuracy,
        "losses": {seed: [r["first_loss"], r["last_loss"]] for seed, r in found["seeds"].items()},
        "images": found["images"],
        "classes": found["classes"],
        "accuracy": {
            "zero_shot": {t: m["accuracy"] for t, m in found["zero_shot"].items()},
            **{
                f"seed {seed}": {t: m["accuracy"] for t, m in r["metrics"].items()}
                for seed, r in found["seeds"].items()
            },
        },
        "exports": exports,
    }
    write_json(results / "gdpl-transfer.json", summary)
    write_text(results / "gdpl-transfer.md", result_markdown(found))
    print(f"{summary['seconds']} s")


def enlarge(scan: np.ndarray) -> Image.Image:
    """Enlarge uint8 [8, 8] to an RGB image of ``SIZE``, bright strokes on black."""
    return Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")


def write_domain(root: Path, scans: list[Image.Image], labels: np.ndarray) -> None:
    """Write the other domain as class folders, half of it for training."""
    rng = np.random.default_rng(1)
    for index, (scan, label) in enumerate(zip(scans, labels, strict=True)):
        folder = root / ("train" if index < len(scans) // 2 else "test") / WORDS[label]
        folder.mkdir(parents=True, exist_ok=True)
        crooked = scan.rotate(35, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(0.7))
        values = 30 + 0.7 * np.asarray(crooked, dtype=np.float64)
        values += rng.normal(0, 25, values.shape[:2])[..., None]
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04}.png")


def tensors(images: Sequence[Image.Image]) -> Tensor:
    """Return normalised images [N, 3, H, W]."""
    preprocess = Preprocess((3, SIZE, SIZE), mean=MEAN, std=STD)
    stacked = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))) for i in images])
    return preprocess.normalize(stacked.permute(0, 3, 1, 2))


def jitter(images: Tensor) -> Tensor:
    """Shift by up to 3 pixels, change contrast and brightness: small data needs it."""
    dx, dy = torch.randint(-3, 4, (2,)).tolist()
    contrast = torch.empty(len(images), 1, 1, 1).uniform_(0.6, 1.2)
    shift = torch.empty(len(images), 1, 1, 1).uniform_(-0.2, 0.2)
    return images.roll((dy, dx), dims=(2, 3)) * contrast + shift


def train_clip(scans: list[Image.Image], labels: np.ndarray, folder: Path) -> float:
    """Train and write a CLIP model; return its accuracy on the fifth that was held out."""
    import open_clip

    clip = open_clip.CLIP(**CLIP)
    # 49,408 embeddings for a dozen words: random ones tell them apart, and cost no time.
    clip.token_embedding.requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])
    texts = [tokenizer([template.format(word) for word in WORDS]) for template in TEMPLATES]
    x, y = tensors(scans), torch.from_numpy(labels)
    held = len(x) // 5
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05)
    epochs, batch = 60, 90
    steps = epochs * math.ceil((len(x) - held) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in (torch.randperm(len(x) - held) + held).split(batch):
            text = texts[int(torch.randint(len(texts), ()))]
            image_features = clip.encode_image(jitter(x[rows]), normalize=True)
            text_features = clip.encode_text(text, normalize=True)
            logits = clip.logit_scale.exp() * image_features @ text_features.T
            loss = F.cross_entropy(logits, y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    clip.eval()
    with torch.no_grad():
        image_features = clip.encode_image(x[:held], normalize=True)
        logits = image_features @ clip.encode_text(texts[0], normalize=True).T
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return (logits.argmax(1) == y[:held]).float().mean().item()


def train_encoder(images: Sequence[Image.Image], file: Path) -> float:
    """Train an encoder on the domain without labels: it learns to tell rotations."""
    import timm

    encoder: Any = timm.create_model(ENCODER, num_classes=0)
    head = nn.Linear(encoder.num_features, 4)
    x = tensors(images)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(8):
        hits = 0
        for rows in torch.randperm(len(x)).chunk(7):
            turns = torch.randint(4, (len(rows),))
            turned = torch.stack(
                [x[i].rot90(int(t), dims=(1, 2)) for i, t in zip(rows, turns, strict=True)]
            )
            logits = head(encoder(turned))
            optimizer.zero_grad()
            F.cross_entropy(logits, turns).backward()
            optimizer.step()
            hits += (logits.argmax(1) == turns).sum().item()
    save_file(encoder.state_dict(), file)
    return hits / len(x)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run GDPL from images to a bundle.")
    parser.add_argument("--out", type=Path, default=Path("gdpl-out"))
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--seeds", default="1,2,3")
    args = parser.parse_args()
    main(args.out.absolute(), args.results, tuple(int(s) for s in args.seeds.split(",")))
