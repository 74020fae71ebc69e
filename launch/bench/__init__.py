"""Benchmarks: ``python -m launch.bench.NAME``, each with its own flags."""
