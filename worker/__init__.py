"""A GPU inference worker: jobs come from a Redis stream, tokens go to a stream a job.

Start reading at docs/architecture.md, then `worker/ops.py`, `worker/model.py` and `worker/engine/`.
"""

__version__ = "0.1.0"
