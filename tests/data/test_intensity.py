import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from fastadapt.data.intensity import (
    IntensitySetting,
    ValueStatistics,
    choose_range,
    warn_of_little_range,
)
from fastadapt.data.pixels import DeepImage
from fastadapt.errors import InputError


def deep(values, bits=None):
    values = np.atleast_2d(values)
    return DeepImage(values, bits or 8 * values.dtype.itemsize)


def measured(images, with_counts=False):
    total = ValueStatistics()
    for image in images:
        total.add(ValueStatistics.of(image, with_counts))
    return total


def chosen(text, *images):
    setting = IntensitySetting.parse(text)
    statistics = measured(images, setting.kind == "percentiles")
    return choose_range(setting, statistics, lambda: iter(images))


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("dtype", IntensitySetting("dtype")),
        ("auto", IntensitySetting("auto")),
        ("0:4095", IntensitySetting("values", 0, 4095)),
        ("-1000:2000.5", IntensitySetting("values", -1000, 2000.5)),
        (" 1e-3 : 1E3 ", IntensitySetting("values", 0.001, 1000)),
        ("1%:99%", IntensitySetting("percentiles", 1, 99)),
        ("0.5% : 100%", IntensitySetting("percentiles", 0.5, 100)),
    ],
)
def test_forms_of_the_setting(text, setting):
    assert IntensitySetting.parse(text) == setting


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Auto ",
        "1",
        "1:",
        "5:5",
        "9:1",
        "1%:99",
        "-1%:50%",
        "1%:101%",
        "nan:1",
        "0:inf",
        "0:1e999",
    ],
)
def test_other_forms_are_refused(text):
    with pytest.raises(InputError, match="intensity_range"):
        IntensitySetting.parse(text)


def test_dtype_and_values_do_not_look_at_images():
    image = deep(np.array([700, 2600], np.uint16))
    assert chosen("dtype", image) is None
    assert chosen("5:4095", image) == (5, 4095)


@pytest.mark.parametrize(
    ("largest", "high"),
    [
        *[(0, 1), (1, 1), (2, 255), (255, 255), (256, 1023), (1023, 1023), (1024, 4095)],
        *[(2639, 4095), (4095, 4095), (4096, 16383), (16383, 16383), (16384, 65535)],
        (65535, 65535),
    ],
)
def test_auto_is_the_fewest_bits(largest, high):
    assert chosen("auto", deep(np.array([0, largest], np.uint16))) == (0, high)


@pytest.mark.parametrize(
    ("values", "right"),
    [
        *[([-1, 100], (-128, 127)), ([-1024, 1000], (-2048, 2047)), ([-512, 511], (-512, 511))],
        *[([-1024, 3071], (-8192, 8191)), ([-1, 32767], (-32768, 32767))],
    ],
)
def test_auto_of_signed_values(values, right):
    assert chosen("auto", deep(np.array(values, np.int16))) == right


def test_auto_holds_the_largest_of_all_images():
    images = [deep(np.array([1, top], np.uint16)) for top in (900, 2639, 5)]
    assert chosen("auto", *images) == (0, 4095)
    assert chosen("auto", Image.new("L", (2, 2), 200)) == (0, 255)
    assert chosen("auto", Image.new("L", (2, 2), 1)) == (0, 1)


def test_auto_beyond_its_bits_is_refused():
    with pytest.raises(InputError, match=r"floating-point.*LOW:HIGH"):
        chosen("auto", deep(np.array([0.5, 1.0], np.float32)))
    with pytest.raises(InputError, match=r"up to 16 bits.*70000"):
        chosen("auto", deep(np.array([0, 70000], np.int32)))


@settings(max_examples=100, deadline=None)
@given(
    images=st.sampled_from((np.uint8, np.int8, np.uint16, np.int16)).flatmap(
        lambda t: st.lists(npst.arrays(t, npst.array_shapes(min_dims=2, max_dims=2)), min_size=1)
    ),
    shares=st.tuples(st.integers(0, 100), st.integers(0, 100)).filter(lambda p: p[0] < p[1]),
)
def test_percentiles_are_numpys_over_all_values(images, shares):
    values = np.concatenate([image.reshape(-1) for image in images])
    low, high = np.percentile(values, shares, method="inverted_cdf").astype(float)
    text = f"{shares[0]}%:{shares[1]}%"
    if low == high:
        with pytest.raises(InputError, match="further apart"):
            chosen(text, *map(deep, images))
    else:
        assert chosen(text, *map(deep, images)) == (low, high)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_percentiles_of_wide_values_are_close(dtype):
    rng = np.random.default_rng(0)
    images = [(rng.normal(0, 1, (50, 50)) * 1e6).astype(dtype) for _ in range(4)]
    values = np.concatenate(images)
    low, high = chosen("2%:97%", *map(deep, images))
    bin_width = (float(values.max()) - float(values.min())) / 65536
    right = np.percentile(values, (2, 97), method="inverted_cdf")
    assert low == pytest.approx(right[0], abs=bin_width)
    assert high == pytest.approx(right[1], abs=bin_width)


def test_percentiles_of_8_bit_images():
    images = [Image.new("L", (10, 10), 20), Image.new("L", (10, 10), 90)]
    assert chosen("10%:90%", *images) == (20, 90)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (deep(np.array([734, 2639], np.uint16)), "largest value is 2639.*0 to 65535.*4.0%"),
        (deep(np.array([734, 16384], np.uint16)), None),
        (deep(np.array([-1024, 3071], np.int16)), "values go from -1024 to 3071.*6.2%"),
        (deep(np.array([-20000, 3071], np.int16)), None),
        (deep(np.array([3, 4000], np.uint16), 12), None),
        (Image.new("L", (2, 2), 1), "largest value is 1,.*0 to 255"),
        (Image.new("L", (2, 2), 64), None),
        (deep(np.array([0.0, 1.0], np.float32)), None),
    ],
)
def test_little_use_of_a_type_is_warned_of(image, says):
    warning = warn_of_little_range(measured([image]))
    if says is None:
        assert warning is None
    else:
        assert warning is not None
        assert re.search(says, warning) and "intensity range to auto" in warning
