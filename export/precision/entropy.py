"""Entropy calibration: where to clip the activations that INT8 quantises, from histograms.

Clipping at the largest value keeps every outlier and gives all other values wider steps. TensorRT's
way instead clips where the quantised distribution tells the most of the original one (S. Migacz,
"8-bit inference with TensorRT", GTC 2017), as NVIDIA's ModelOpt and pytorch-quantization do:

1. Count absolute values in B bins of equal width; c_0, which holds the zeros that ReLU makes, is
   set to c_1, since zero is exact at every threshold.
2. For every threshold of i bins, i = L … B, with L = 128 steps:
   p_j = c_j, j < i, the bins beyond it added to p_{i-1};
   q_j = the mean of those c_k ≠ 0 that fall into the same step as j, 0 where c_j = 0.
3. Take the largest i of the least Kullback-Leibler divergence Σ_j p_j log(p_j / q_j), both
   normalised to sum 1.

(ONNX Runtime's own search is over a histogram of both signs, where ReLU's zeros decide: it clips
half-normal values at 2 standard deviations and loses more than rounding does.)
"""

from __future__ import annotations

import numpy as np

BINS = 2048
STEPS = 128  # of INT8 from zero to the threshold
# In place of a count of 0 where p is not 0: the last bin, if it holds clipped values only. Without
# it no threshold between the values and a far outlier would have a finite divergence. (MXNet's.)
SMOOTHING = 1e-4


class AbsoluteHistogram:
    """Counts of absolute values in bins of equal width, and the range of the values.

    The number of bins is fixed: where a value is beyond the last one, each bin takes two, until
    none is. So memory does not depend on how much is counted, nor on its order.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.top = 0.0  # the last bin's upper edge
        self.low, self.high = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        """Count values of any shape.

        Raises:
            ValueError: a value is not finite.
        """
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        largest = max(-low, high)
        if not np.isfinite(largest):
            raise ValueError("an activation is not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.top == 0:  # what was counted are zeros, in the first bin
            self.top = largest
        while largest > self.top:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros_like(pairs)])
            self.top *= 2
        if self.top == 0:
            self.counts[0] += values.size
        else:
            self.counts += np.histogram(np.abs(values), BINS, range=(0, self.top))[0]

    @property
    def range(self) -> tuple[float, float]:
        """The least and largest value that quantisation should tell apart."""
        threshold = best_bins(self.counts) * self.top / BINS
        return max(self.low, -threshold), min(self.high, threshold)


def best_bins(counts: np.ndarray) -> int:
    """Return how many of the bins lie below the threshold of the least divergence.

    Args:
        counts: [B] of absolute values, from zero on.
    """
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    filled = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    beyond = counts.sum() - np.cumsum(counts)  # [B], in the bins after each
    least, best = np.inf, len(counts)
    # Beyond the last filled bin no threshold tells more.
    for bins in range(max(1, min(STEPS, filled)), filled + 1):
        divergence = _divergence(counts[:bins], beyond[bins - 1])
        if divergence <= least:
            least, best = divergence, bins
    return best


def _divergence(counts: np.ndarray, beyond: float) -> float:
    reference = counts.copy()
    reference[-1] += beyond
    step = np.arange(len(counts)) * STEPS // len(counts)
    used = counts > 0
    sums = np.bincount(step, counts, STEPS)
    means = sums / np.maximum(np.bincount(step[used], minlength=STEPS), 1)
    quantized = np.where(used, means[step], 0)
    given = reference > 0
    quantized[given] = np.maximum(quantized[given], SMOOTHING)
    p, q = reference[given] / reference.sum(), quantized[given] / quantized.sum()
    return float((p * np.log(p / q)).sum())
