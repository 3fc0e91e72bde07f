"""Train, export, verify, and predict from image files: the commands of the README, in Python.

    python examples/export_and_predict.py --data DATA --backbone convnext_tiny --out bundle

DATA is a folder of class folders; without it, images of two textures are drawn.
``--random-weights`` needs no download, and learns accordingly.
"""

import argparse
import tempfile
from pathlib import Path

from textures import make_images

import fastadapt as fa
from fastadapt.train import TrainConfig, train


def main(arguments: list[str] | None = None) -> None:
    """Write a bundle, verify it, and print what it says to a few images."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of class folders")
    parser.add_argument("--backbone", default="convnext_tiny", help="timm's name")
    parser.add_argument("--random-weights", action="store_true", help="download nothing")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("bundle"), help="the bundle's folder")
    options = parser.parse_args(arguments)

    work = Path(tempfile.mkdtemp())
    data = options.data or make_images(work / "images")
    trained = train(
        data,
        work / "run",
        options.backbone,
        TrainConfig(epochs=options.epochs),
        fa.AdaptConfig(num_centers=8, rank=64, mlp_ratio=1.0),
        pretrained=not options.random_weights,
    )
    print(f"validation accuracy: {trained.results['val']['accuracy']:.1%}")

    # The bundle is written only if the exported model agrees with the trained one.
    exported = fa.export.export_run(trained.out, options.out)
    assert fa.export.verify_bundle(exported.bundle).passed

    predict = fa.export.load(exported.bundle)
    paths = sorted(data.rglob("*.png"))[::8]
    result = predict(paths)
    for path, label, shares in zip(paths, result.labels, result.probabilities, strict=True):
        print(f"{path.relative_to(data)}: {label}, {shares.max():.0%}")


if __name__ == "__main__":
    main()
