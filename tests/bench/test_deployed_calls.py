"""Calls of models that take images are timed in images, and in milliseconds for single ones."""

import itertools

import torch

from fastadapt.bench import deployed_calls


def test_images_have_many_colours():
    images = deployed_calls.make_images(4)
    assert images.shape == (4, deployed_calls.SIZE, deployed_calls.SIZE, 3)
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert torch.equal(images, deployed_calls.make_images(4))
    assert not torch.equal(images, deployed_calls.make_images(4, seed=2))


def test_rates_and_latencies_are_of_the_clock(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(deployed_calls.time, "perf_counter", lambda: 0.25 * next(clock))
    seen = []
    # Each reading of the clock is a quarter of a second after the one before: so is every round.
    rate = deployed_calls.images_per_second(lambda x: seen.append(len(x)), 3, seconds=1.5)
    assert rate == 3 * 1 / 0.25 and set(seen) == {3}
    assert deployed_calls.latency(lambda x: x) == {"p50, ms": "250.000", "p99, ms": "250.000"}
