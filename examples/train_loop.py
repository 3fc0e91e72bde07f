"""Train an adapter in a loop of your own, save it, load it again, and fold it.

    python examples/train_loop.py --data DATA --backbone vit_base_patch16_224

DATA is a folder of class folders; without it, images of two textures are drawn.
``--random-weights`` needs no download, and learns accordingly.
"""

import argparse
import tempfile
from pathlib import Path

import timm.data
import torch
from textures import make_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import fastadapt as fa


def main(arguments: list[str] | None = None) -> None:
    """Train on the images, and show that the folded model gives the same logits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of class folders")
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm's name")
    parser.add_argument("--random-weights", action="store_true", help="download nothing")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder for the adapter")
    options = parser.parse_args(arguments)

    data = options.data or make_images(Path(tempfile.mkdtemp()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = timm.create_model(options.backbone, pretrained=not options.random_weights)
    # Images as the backbone was trained on them: size, crop, mean and standard deviation.
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))
    images = ImageFolder(str(data), transform)
    loader = DataLoader(images, batch_size=8, shuffle=True)

    config = fa.AdaptConfig(num_centers=8, rank=64, mlp_ratio=1.0)
    model = fa.adapt(backbone, config, num_classes=len(images.classes)).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]  # the adapter and the head
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for epoch in range(options.epochs):
        total = 0.0
        for batch, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(batch.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}")

    fa.save_adapter(model, options.out)  # config.json and adapter.safetensors
    loaded = fa.load_adapter(options.out, backbone).to(device).eval()
    folded = fa.fold(loaded)  # ordinary PyTorch operators
    with torch.no_grad():
        difference = (folded(batch.to(device)) - loaded(batch.to(device))).abs().max()
    print(f"the folded model's logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
