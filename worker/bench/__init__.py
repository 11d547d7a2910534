"""The measurements of `worker bench`: speeds and bytes moved. Read bench.py, then result.py."""

from worker.bench.bench import run
from worker.bench.result import Figure, Result

__all__ = ["Figure", "Result", "run"]
