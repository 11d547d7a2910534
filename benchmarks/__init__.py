"""Benchmarks: a script a question. Each prints its figures beside what they are measured against."""
