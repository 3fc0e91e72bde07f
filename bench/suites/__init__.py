"""One file per benchmark; each declares a ``BENCHMARK``, which ``runner.NAMES`` lists."""
