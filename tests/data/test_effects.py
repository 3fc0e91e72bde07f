"""Blur and erasing, each image by its own numbers."""

import torch

from fastadapt.data.effects import ERASED_AREA, blur, erase


def test_blur_is_a_gaussian_of_each_image_s_own():
    images = torch.zeros(3, 2, 21, 21)
    images[:, :, 10, 10] = 1
    blurred = blur(images, torch.tensor([0.0, 1.0, 2.0]), 2.0)
    torch.testing.assert_close(blurred[0], images[0])
    assert torch.allclose(blurred.sum((2, 3)), torch.ones(3, 2), atol=1e-5)
    offsets = torch.arange(21) - 10.0
    for index, sigma in ((1, 1.0), (2, 2.0)):
        spread = (blurred[index, 0].sum(0) * offsets**2).sum().sqrt()
        assert abs(spread.item() - sigma) < 0.03
    alone = blur(images[2:], torch.tensor([2.0]), 2.0)
    torch.testing.assert_close(alone, blurred[2:])
    assert blur(torch.ones(1, 3, 1, 1), torch.ones(1), 2.0).shape == (1, 3, 1, 1)


def test_erasing_fills_a_rectangle_with_the_mean():
    images = torch.rand(64, 3, 32, 32)
    used = torch.arange(64) % 2 == 0
    erased = erase(images, torch.rand(64, 4), used)
    changed = (erased != images).any(1)
    assert not changed[1::2].any() and changed[::2].flatten(1).any(1).all()
    share = changed[::2].float().mean((1, 2))
    assert share.min() > ERASED_AREA[0] / 2 and share.max() < ERASED_AREA[1] + 0.1
    for image, result, mask in zip(images[::2], erased[::2], changed[::2], strict=True):
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()
        torch.testing.assert_close(
            result[:, mask], image.mean((1, 2))[:, None].expand(-1, mask.sum())
        )
