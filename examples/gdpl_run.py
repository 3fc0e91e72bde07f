"""Train GDPL for a CLIP model on a few images per class, and evaluate it on unseen classes.

    python examples/gdpl_run.py --data DATA --out RUN

DATA is a folder of at least four class folders. The CLIP model and the domain encoder are
downloaded; ``--clip local-dir:FOLDER`` and ``--encoder-weights FILE`` take local ones.
"""

import argparse
import json
from pathlib import Path

import torch

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table of accuracies, and classify an image into other classes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--out", type=Path, default=Path("run"), help="the run folder")
    parser.add_argument("--clip", default="ViT-B-16", help="open_clip's name")
    parser.add_argument("--clip-weights", help="open_clip's tag, laion2b_s34b_b88k for ViT-B-16")
    parser.add_argument("--encoder", default="vit_base_patch16_224.mae", help="timm's name")
    parser.add_argument("--encoder-weights", help="local file of the encoder's weights")
    parser.add_argument("--shots", type=int, default=16, help="training images per class")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--depth", type=int, default=9, help="layers that get prompts")
    options = parser.parse_args(arguments)

    if options.clip == "ViT-B-16" and options.clip_weights is None:
        options.clip_weights = "laion2b_s34b_b88k"
    source = fa.gdpl.GDPLSource(
        options.clip, options.clip_weights, options.encoder, options.encoder_weights
    )
    config = fa.gdpl.GDPLTrainConfig(shots=options.shots, epochs=options.epochs)
    prompts = fa.gdpl.GDPLConfig(depth=options.depth, rank_depth=options.depth)
    results = fa.gdpl.train_gdpl(options.data, options.out, source, config, prompts)
    for seed, result in results["seeds"].items():
        for task, metrics in result["metrics"].items():
            print(f"seed {seed}, {task} classes: accuracy {metrics['accuracy']:.1%}")

    model = fa.gdpl.load_gdpl(options.out)
    image = next(path for path in sorted(options.data.rglob("*.png")))
    config = json.loads((options.out / "config.json").read_text())
    preprocess = Preprocess.from_dict(config["preprocess"])
    pixels = preprocess.normalize(preprocess.read(image)[None])
    names = ["something striped", "something crossed"]
    model.set_class_names(names)  # no training needed
    with torch.no_grad():
        shares = model(pixels).softmax(-1)[0]
    print(f"{image.name}: {names[int(shares.argmax())]}, {shares.max():.0%}")


if __name__ == "__main__":
    main()
