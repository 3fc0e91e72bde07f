"""Our resizing is timm's, pixel for pixel."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from fastadapt.data.resize import Geometry

SIDES = st.integers(1, 90)


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["center", "squash", "border"]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    size=st.tuples(SIDES, SIDES),
    height=st.integers(8, 60),
    width=st.integers(8, 60),
    square=st.booleans(),
    crop_pct=st.floats(0.3, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_mode_is_timms(mode, interpolation, size, height, width, square, crop_pct, seed):
    width = height if square else width
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    transform = create_transform(
        (3, height, width),
        is_training=False,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=mode,
        normalize=False,
    )
    geometry = Geometry(height, width, interpolation, crop_pct, mode)
    try:
        expected = transform(image).permute(1, 2, 0).numpy()
    except ValueError:  # an extreme shape, one of whose sides would be resized to nothing
        try:
            geometry.apply(image)
        except ValueError:
            return
        raise
    assert np.array_equal(np.asarray(geometry.apply(image)), expected)
