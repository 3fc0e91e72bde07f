"""Time operations, training steps, deployment and whole jobs beside PyTorch and the papers' code.

- ``suites/`` has one file per benchmark, each of which declares a
  :class:`~fastadapt.bench.protocol.Benchmark`;
- ``harness``, ``operation`` and ``network_step`` measure, ``upstream`` restates the papers' code;
- ``runner`` runs benchmarks by name (``fastadapt bench``), ``tune`` measures configurations;
- ``reporting/`` makes tables, pictures and comparisons of what ``results/`` holds.
"""

from .runner import NAMES, run

__all__ = ["NAMES", "run"]
