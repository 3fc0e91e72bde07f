"""Views follow from their seeds alone, and show the right pixels."""

import numpy as np
import pytest
import torch

from fastadapt.data.augment import (
    AUGMENTATIONS,
    AUGMENTS,
    DRAWS,
    Augmentation,
    check_augment,
    draw,
)
from fastadapt.data.preprocess import Preprocess
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError

PLAIN = Geometry(16, 16)


def images(count=6, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def drawn(count, **columns):
    """Neutral draws: the middle of everything, no flips; with some columns set."""
    draws = torch.full((count, DRAWS), 0.5)
    for column, value in columns.items():
        draws[:, int(column[1:])] = value
    return draws


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_view_depends_on_its_draws_alone(name):
    augmentation = AUGMENTATIONS[name]
    stored = augmentation.stored(PLAIN)
    batch = images(8, stored.height)
    table = torch.from_numpy(draw(0, 3, 8))
    whole = augmentation.apply(batch, table, PLAIN)
    assert whole.shape == (8, 3, 16, 16)
    rows = torch.tensor([5, 0, 7])
    torch.testing.assert_close(
        augmentation.apply(batch[rows], table[rows], PLAIN), whole[rows], rtol=0, atol=1e-3
    )
    assert np.array_equal(draw(0, 3, 8), draw(0, 3, 8))
    assert not np.array_equal(draw(0, 3, 8), draw(0, 4, 8))
    assert not np.array_equal(draw(1, 3, 8), draw(0, 3, 8))


def test_flips_and_transposition_move_pixels_exactly():
    batch = images(200)
    symmetries = [
        lambda x, f=f, t=t: x.flip(f).transpose(1, 2) if t else x.flip(f)
        for f in ([], [1], [2], [1, 2])
        for t in (False, True)
    ]
    views = AUGMENTATIONS["dihedral"].apply(batch, torch.from_numpy(draw(0, 1, 200)), PLAIN)
    assert views.dtype == torch.uint8
    found = set()
    for image, view in zip(batch, views, strict=True):
        (which,) = [i for i, s in enumerate(symmetries) if torch.equal(s(image), view)]
        found.add(which)
    assert found == set(range(8))
    flips = AUGMENTATIONS["flips"].apply(batch, torch.from_numpy(draw(0, 1, 200)), PLAIN)
    assert all(
        any(torch.equal(x.flip(f), v) for f in ([], [1], [2], [1, 2]))
        for x, v in zip(batch, flips, strict=True)
    )


def test_neutral_draws_change_nothing():
    batch = images()
    everything = Augmentation(
        flips=True, transpose=True, rotation=180, shift=0.1, scale=0.3, brightness=0.2, contrast=0.2
    )
    torch.testing.assert_close(
        everything.apply(batch, drawn(6), PLAIN), batch.float(), rtol=0, atol=1e-3
    )


def test_rotation_by_quarters_shifts_and_crops_read_the_right_pixels():
    batch = images()
    turned = Augmentation(rotation=90).apply(batch, drawn(6, c8=1.0), PLAIN)
    assert any(torch.allclose(turned, batch.float().rot90(k, (2, 3)), atol=1e-2) for k in (1, 3))
    moved = Augmentation(shift=0.25).apply(batch, drawn(6, c10=1.0), PLAIN)
    torch.testing.assert_close(moved[..., :12], batch.float()[..., 4:], rtol=0, atol=1e-2)
    crop = Augmentation(crop_area=(0.25, 0.25), crop_aspect=(1, 1))
    large = images(6, 32)
    assert crop.stored(PLAIN) == Geometry(32, 32, "bicubic")
    corner = crop.apply(large, drawn(6, c5=0.0, c6=0.0), PLAIN)
    torch.testing.assert_close(corner, large.float()[..., :16, :16], rtol=0, atol=1e-2)
    flipped = Augmentation(flips=True, crop_area=(0.25, 0.25), crop_aspect=(1, 1))
    mirrored = flipped.apply(large, drawn(6, c0=0.0, c5=0.0, c6=0.0), PLAIN)
    torch.testing.assert_close(mirrored, corner.flip(3), rtol=0, atol=1e-2)


def test_reduced_images_lose_no_pixel_between_those_read():
    crop = Augmentation(crop_area=(0.0625, 1.0), crop_aspect=(1, 1))
    assert crop.stored(PLAIN).height == 64
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255  # read at every fourth column alone, all black or all white
    whole = crop.apply(stripes, drawn(1, c3=1.0), PLAIN)
    torch.testing.assert_close(whole, torch.full_like(whole, 127.5), rtol=0, atol=1.0)


def test_brightness_and_contrast_stay_in_range():
    batch = images()
    bright = Augmentation(brightness=0.5).apply(batch, drawn(6, c13=1.0), PLAIN)
    torch.testing.assert_close(bright, (batch.float() + 127.5).clamp(max=255))
    flat = Augmentation(contrast=0.5).apply(batch, drawn(6, c12=0.0), PLAIN)
    torch.testing.assert_close(flat, batch.float() * 0.5)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="augment is 'blur'"):
        check_augment("blur", Preprocess((3, 32, 32)))
    with pytest.raises(InputError, match="needs square images; these are 32×48"):
        check_augment("dihedral", Preprocess((3, 32, 48)))


def test_a_black_border_stays_black_whatever_the_brightness():
    bright = Augmentation(rotation=180, border="black", brightness=1.0, contrast=1.0)
    view = bright.apply(images() // 2 + 60, drawn(6, c8=0.625, c13=0.7), PLAIN)  # by 45 degrees
    assert (view[:, :, 0, 0] == 0).all() and (view[:, :, 8, 8] > 60).all()
    mirrored = Augmentation(rotation=180).apply(images() // 2 + 60, drawn(6, c8=0.625), PLAIN)
    assert (mirrored[:, :, 0, 0] > 50).all()


def test_shares_of_the_views_change():
    batch = images(2000, size=4)
    table = torch.from_numpy(draw(0, 1, 2000))
    some = Augmentation(brightness=0.2, color_probability=0.5).apply(batch, table, Geometry(4, 4))
    changed = (some != batch).flatten(1).any(1).float().mean()
    assert 0.45 < changed < 0.55
    blurred = Augmentation(blur=1.0, blur_probability=0.3).apply(batch, table, Geometry(4, 4))
    assert 0.18 < ((blurred - batch).abs() > 1e-3).flatten(1).any(1).float().mean() < 0.35
    erased = Augmentation(erase=0.2).apply(batch, table, Geometry(4, 4))
    assert 0.1 < (erased != batch).flatten(1).any(1).float().mean() < 0.25


def test_names():
    assert all(AUGMENTATIONS[name].name == name for name in AUGMENTS)
    assert Augmentation(border="black", color_probability=0.5, blur_probability=0).plain
    assert not Augmentation(rotation=1).plain and "rotation=1" in Augmentation(rotation=1).name


def test_imagenet_crops_are_torchvision_s():
    """Areas and aspects have its distribution: uniform, and log-uniform, where they fit."""
    from torchvision.transforms import v2

    count, (wide, high) = 4000, (300, 200)
    torch.manual_seed(0)
    image, random = torch.zeros(1, high, wide), v2.RandomResizedCrop(8, (0.08, 1.0))
    theirs = [random.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([(p["width"] / wide, p["height"] / high) for p in theirs])
    table = torch.from_numpy(draw(0, 1, count))
    matrix = AUGMENTATIONS["imagenet"]._matrix(table, wide / high)
    ours = torch.stack([matrix[:, 0, 0].abs(), matrix[:, 1, 1]], 1)
    for statistic in (lambda s: s.prod(1), lambda s: (s[:, 0] / s[:, 1] * wide / high).log()):
        mine, their = statistic(ours).sort().values, statistic(theirs).sort().values
        assert (mine - their).abs().mean() < 0.02
    assert (matrix[:, 1, 1] > 0).all()  # never upside down
