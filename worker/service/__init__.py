"""The service: a worker's asyncio life, from jobs in a queue to tokens on their streams.

| question | file |
| --- | --- |
| start, claim, drain, stop, watchdog | `service.py` |
| one job's attempt, and the renewal of its lease | `attempt.py` |
| decoding and preparing a job, deadline and inference timeout | `prepared_job.py` |
| from the engine to the job's stream: speculative start, batching, metrics | `generation.py` |
| tokens of all jobs in one round trip | `flush_loop.py` |
| the thread that owns the device, and when it launches a step | `engine_thread.py`, `pacing.py` |
| the worker's own events, registry entry and memory reports | `reporter.py` |
| health and its HTTP pages | `health.py` |

A prompt is tokenized (`tokenize_job`) and a token's text released in `worker/answer.py`; text is
withheld for a stop string in `worker/text/detokenizer.py`. Device memory is measured by
`Device.memory` (`worker/backend.py`), the decode graph captured in `worker/gpu/runner.py`.
"""

from worker.service.service import Assignment, Service

__all__ = ["Assignment", "Service"]
