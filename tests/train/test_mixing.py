"""Mixed batches, and the loss of their labels."""

import pytest
import torch
import torch.nn.functional as F

from fastadapt.train.mixing import make_mix
from fastadapt.train.sources import padded
from fastadapt.train.step import cross_entropy

LABELS = torch.tensor([0, 2, 1, 1])


def constant(shape):
    """One value for each image: 1, 2, 3, 4."""
    return torch.arange(1.0, 5.0).view(4, *(1,) * (len(shape) - 1)).expand(shape).contiguous()


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 5, 6), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixup_mixes_neighbours_and_their_labels(shape, dtype):
    mix = make_mix(1.0, 0.0, 3, images=False)
    inputs, shares = mix(constant(shape).to(dtype), LABELS)
    assert inputs.shape == shape and inputs.dtype == dtype and shares.dtype == torch.float32
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    part = shares[0, 0]
    expected = part * constant(shape) + (1 - part) * constant(shape).roll(1, 0)
    torch.testing.assert_close(inputs.float(), expected, rtol=0, atol=1e-2)
    assert shares[0, 1] == pytest.approx(1 - part)  # the last one's class


def test_cutmix_pastes_a_rectangle_of_the_share():
    mix = make_mix(0.0, 1.0, 3, images=True)
    images = constant((4, 3, 16, 16))
    for _ in range(5):
        mixed, shares = mix(images, LABELS)
        own = (mixed == images).float().mean((1, 2, 3))
        torch.testing.assert_close(shares[0, 0], own[0])
        assert ((mixed == images) | (mixed == images.roll(1, 0))).all()


def test_which_batches_are_mixed():
    assert make_mix(0.0, 0.0, 3, True) is None and make_mix(0.0, 1.0, 3, images=False) is None
    both, seen = make_mix(1.0, 1.0, 3, True), set()
    for _ in range(20):
        mixed, _ = both(constant((4, 1, 8, 8)), LABELS)
        seen.add(bool((mixed == mixed.round()).all()))
    assert seen == {True, False}
    drawn = []
    for _ in range(2):  # from PyTorch's generator, which the loop seeds for each epoch
        torch.manual_seed(5)
        drawn.append(both(constant((4, 1, 8, 8)), LABELS)[0])
    assert torch.equal(*drawn)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0])])
def test_loss_of_shares(smoothing, weights):
    logits = torch.randn(4, 3)
    expected = F.cross_entropy(logits, LABELS, weights, label_smoothing=smoothing)
    shares = F.one_hot(LABELS, 3).float()
    torch.testing.assert_close(cross_entropy(logits, shares, weights, smoothing), expected)
    filled, more = padded(logits, shares, 6)  # rows that only fill a batch up do not count
    assert len(more) == 6
    torch.testing.assert_close(cross_entropy(filled, more, weights, smoothing), expected)
    if weights is None and not smoothing:
        mixed = 0.3 * shares + 0.7 * shares.roll(1, 0)
        torch.testing.assert_close(cross_entropy(logits, mixed), F.cross_entropy(logits, mixed))
