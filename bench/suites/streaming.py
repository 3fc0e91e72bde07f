"""Time features of images that do not fit into memory: decoded by processes beside the GPU."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastadapt import environment_variables
from fastadapt.adapted_model import AdaptedModel, adapt
from fastadapt.config import AdaptConfig
from fastadapt.data.dataset import Sample
from fastadapt.data.decode_on import DecodeOn
from fastadapt.data.decode_pool import DecodePool, Reading, default_workers
from fastadapt.data.decode_ring import DecodeRing
from fastadapt.data.gpu_decode import GpuDecoder
from fastadapt.data.images import DECODED_AT_ONCE, ImageSource, check_decoded
from fastadapt.data.preprocess import Preprocess
from fastadapt.train.feature_cache import GPU_BATCH_SIZE, Extraction

from .. import harness
from ..protocol import Benchmark, Row, Tables

TITLE = "Streaming, from JPEGs to features"
COUNT = "FASTADAPT_STREAMED_IMAGES"  # environment variable: how many
DECODERS: dict[DecodeOn, str] = {"cpu": "processes", "gpu": "GPU"}
DISTINCT = 1000  # images that are drawn; the others are copies of their files
NOTES = (
    "Images a second of the frozen backbone's features where nothing is kept: worker processes "
    "decode and resize (500 × 375 JPEGs, in the page cache), or read files that the GPU decodes "
    "and resizes (`--decode gpu`); batches are on the GPU, and the captured backbone runs in bf16. "
    "Decoder and GPU alone are the same loop without the other half. The first pass, which loads "
    "libraries and captures, is not counted. The number of images is "
    f"{COUNT}, 50,000 if that is not set, of which {DISTINCT} are distinct."
)


def run(quick: bool = False) -> Iterator[Tables]:
    """Measure the decoder, the GPU, and both."""
    harness.release()
    full = torch.cuda.is_available() and not quick
    count = environment_variables.count(COUNT, 50_000 if full else 64)
    name, size = ("vit_base_patch16_224", 224) if full else ("test_vit", 160)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = GPU_BATCH_SIZE if full else 16
    torch.manual_seed(0)
    model = adapt(name, AdaptConfig(input_size=(3, size, size)), 2, pretrained=False)
    model.to(device).eval()
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg)
    with tempfile.TemporaryDirectory() as folder:
        samples = write_images(Path(folder), count)
        rows = list[Row]()
        for place, rates in measure(model, preprocess, samples, device, batch_size):
            slower = min(rates["decoder alone"], rates["GPU alone"])
            row: Row = {"backbone": f"{name}, {size} pixels", "images": count}
            row |= {"cores": os.cpu_count(), "decoded by": DECODERS[place]}
            row |= {title: f"{rate:,.0f}" for title, rate in rates.items()}
            row["of the slower"] = f"{rates['streamed'] / slower:.2f}"
            rows.append(row)
            yield Tables(
                {"Frozen features, images a second": list(rows)},
                notes=[NOTES],
                progress=f"{DECODERS[place]}: {rates['streamed']:,.0f} images a second",
            )


def write_images(folder: Path, count: int) -> list[Sample]:
    """Write JPEGs of 500 × 375 pixels with the detail of photographs, all but the first copies."""
    rng = np.random.default_rng(0)
    paths: list[Path] = []
    for index in range(count):
        path = folder / f"{index // 1000:03}" / f"{index:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        if index < DISTINCT:
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            pixels = np.array(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
            pixels += rng.integers(-16, 17, pixels.shape, dtype=np.int16)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)
        else:
            shutil.copyfile(paths[index % DISTINCT], path)
        paths.append(path)
    return [Sample(path, 0, "train") for path in paths]


def measure(
    model: AdaptedModel,
    preprocess: Preprocess,
    samples: list[Sample],
    device: torch.device,
    batch_size: int,
) -> Iterator[tuple[DecodeOn, dict[str, float]]]:
    """Yield images a second of the decoder, of the GPU, and of both, for each kind of decoder."""

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    extraction = Extraction(model, autocast, graph=True)
    paths = [str(sample.path) for sample in samples]
    reading = Reading(preprocess.geometry)
    whole = len(samples) // batch_size * batch_size
    batch = torch.randn(batch_size, *preprocess.input_size, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)

    def decode(images: int) -> None:
        starts = range(0, images, at_once)
        for batch in ring.batches(paths[i : min(i + at_once, images)] for i in starts):
            check_decoded(batch.answers if finish is None else finish(batch)[1])

    def compute(images: int) -> None:
        for _ in range(images // batch_size):
            extraction(batch)

    def stream(images: int) -> None:
        for inputs, _ in source.batches(np.arange(images), None, batch_size):
            extraction(inputs)

    def rate(run: Callable[[int], None]) -> float:
        run(min(whole, 8 * batch_size))
        _wait(device)
        started = time.perf_counter()
        run(whole)
        _wait(device)
        return whole / (time.perf_counter() - started)

    alone = rate(compute)
    with DecodePool(default_workers()) as pool:
        places: tuple[DecodeOn, ...] = ("cpu", "gpu") if device.type == "cuda" else ("cpu",)
        for place in places:
            finish = GpuDecoder(reading, device) if place == "gpu" else None
            at_once = batch_size if finish is None else DECODED_AT_ONCE
            ring = DecodeRing(pool, reading if finish is None else finish.reading, at_once)
            source = ImageSource(
                samples, preprocess, device, pool=pool, resident=False, decode_on=place
            )
            rates = {"decoder alone": rate(decode), "GPU alone": alone, "streamed": rate(stream)}
            yield place, rates


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


BENCHMARK = Benchmark(TITLE, NOTES, run, slow=True)
