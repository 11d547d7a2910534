"""The service: a worker's life on one event loop, from jobs to tokens on their streams. Read `service.py` first.

Below it `attempt.py` carries one job, `answering.py` is its middle, `engine_thread.py` the other thread's door, and
`reporter.py`, `health.py` and `http_status.py` are what others see. It knows no device and no array.
"""

from worker.service.service import Assignment, Service

__all__ = ["Assignment", "Service"]
