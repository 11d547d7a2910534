"""What `worker bench` measures, each speed beside the bytes that it had to move. Read `bench.py`, then `result.py`."""

from worker.bench.bench import run
from worker.bench.result import Figure, Result

__all__ = ["Figure", "Result", "run"]
