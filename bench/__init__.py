"""Benchmarks: a timing harness, providers side by side, results with provenance."""
