"""Golden samples: decoded images without metadata, or others where images must not leave."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import fastadapt as fa
from fastadapt.export import export_run, verify_bundle
from fastadapt.export.bundle import verify
from fastadapt.files import read_json
from tests.helpers.bundles import reseal

pytestmark = pytest.mark.usefixtures("no_speed")


def images_of(bundle):
    return {file.name: Image.open(file) for file in sorted((bundle / "golden").iterdir())}


def png_of_size(width, height):
    """A PNG that says so; there are no pixels in it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    length, checksum = struct.pack(">I", 13), struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + length + header + checksum + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def all_bytes(bundle):
    return b"".join(file.read_bytes() for file in bundle.rglob("*") if file.is_file())


def test_synthetic_ones_instead_of_patients(run, made, tmp_path, quick):
    manifest = export_run(run, tmp_path / "b", golden="synthetic").manifest
    assert manifest["golden"]["origin"].startswith("synthetic")
    assert manifest["compared_on"] == f"the validation split of {run}"
    patients = {np.asarray(Image.open(p)).tobytes() for p in (made / "images").rglob("*.png")}
    kept = images_of(tmp_path / "b")
    assert len(kept) == 16
    assert not patients & {np.asarray(image).tobytes() for image in kept.values()}
    with safe_open(tmp_path / "b" / "golden.safetensors", framework="np") as file:
        stored = file.get_tensor("images")
        assert json.loads(file.metadata()["labels"]) == [None] * 16
    with safe_open(made / "bundle" / "golden.safetensors", framework="np") as file:
        theirs = {row.tobytes() for row in file.get_tensor("images")}
    assert not theirs & {row.tobytes() for row in stored}
    assert verify_bundle(tmp_path / "b", speed=False).passed


def test_those_of_a_folder(run, tmp_path, quick):
    rng = np.random.default_rng(5)
    (tmp_path / "public").mkdir()
    for index in range(6):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x010E] = "the patient's name"
        image = Image.fromarray(pixels).resize((50, 41))
        image.save(tmp_path / "public" / f"secret-{index}.jpg", exif=exif, quality=95)
    manifest = export_run(run, tmp_path / "b", golden=str(tmp_path / "public")).manifest
    assert manifest["golden"]["samples"] == 6
    content = all_bytes(tmp_path / "b")
    assert b"secret-" not in content and b"the patient's name" not in content
    for image in images_of(tmp_path / "b").values():
        assert image.size == (50, 41) and not image.getexif()
    assert verify_bundle(tmp_path / "b", speed=False).passed
    with pytest.raises(fa.InputError, match="nothing is no folder"):
        export_run(run, tmp_path / "c", golden=str(tmp_path / "nothing"))


def test_names_of_files_are_not_kept(made):
    names = [path.stem for path in (made / "images").rglob("*.png")]
    assert sorted(names, key=int)[-1] == "23"
    bundle = made / "bundle"
    report = (bundle / "report.html").read_text()
    assert not any(f'alt="{name}.png"' in report for name in names)
    golden = read_json(bundle / "manifest.json")["golden"]
    assert golden["images"] == [f"golden/{index:02d}.png" for index in range(16)]


def test_an_image_that_is_none_or_too_large(made, tmp_path):
    bundle = shutil.copytree(made / "bundle", tmp_path / "b")
    for content in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(100)):
        (bundle / "golden" / "03.png").write_bytes(content)
        reseal(bundle)
        with pytest.raises(fa.InputError, match=r"golden/03\.png is no golden image"):
            verify_bundle(bundle)
    (bundle / "golden" / "03.png").write_bytes(png_of_size(30_000, 30_000))
    reseal(bundle)
    with pytest.raises(fa.InputError, match=r"03\.png is no golden image: .*30000|bomb"):
        verify_bundle(bundle)


def test_pixels_of_another_version_may_round_otherwise(made, tmp_path, monkeypatch):
    bundle = shutil.copytree(made / "bundle", tmp_path / "b")
    image = np.asarray(Image.open(bundle / "golden" / "00.png")).astype(int)
    Image.fromarray((image + 1).clip(0, 255).astype(np.uint8)).save(bundle / "golden" / "00.png")
    reseal(bundle)
    with pytest.raises(fa.InputError, match=r"other pixels of golden/00\.png .*by 1 levels"):
        verify_bundle(bundle, speed=False)
    note = "pillow 1.0 made it, 2.0 is here"
    monkeypatch.setattr(verify, "version_changes", lambda manifest: [note])
    result = verify_bundle(bundle, speed=False)
    assert result.passed and result.notes[1] == "preprocessing differs by 1 levels, as versions do"
