"""The service: a worker's asyncio life, from jobs in a queue to tokens on their streams.

| question | file |
| --- | --- |
| start, claim, drain, stop, watchdog | `service.py` |
| one job's attempt, and the renewal of its lease | `attempt.py` |
| decoding and tokenizing a prompt, deadline and inference timeout | `prepared_job.py` |
| from the engine to the job's stream: speculative start, batching, metrics | `generation.py` |
| the thread that owns the device | `engine_thread.py` |
| the worker's own events, registry entry and memory reports | `reporter.py` |
| health and its HTTP pages | `health.py` |

A token's text, and its withholding for a stop string, is in `worker/answer.py` and `worker/text/`.
"""

from worker.service.service import Assignment, Service

__all__ = ["Assignment", "Service"]
