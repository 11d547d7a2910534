"""Benchmarks: each script answers one question and prints its figures beside a reference."""
