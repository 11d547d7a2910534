"""The engine: sequences in, tokens out, in synchronous steps. Token ids only, no text and no jobs.

`engine.py` runs and commits a step; `scheduler.py` admits sequences and chooses the batch;
`kv_blocks.py` counts the readers of KV blocks and finds those that hold a prompt's beginning. The
runner (`worker/model.py`) computes. On a GPU, `worker/gpu/runner.py` captures the decode graph and
`worker/gpu/memory.py` accounts device memory.
"""

from worker.engine.engine import DrawnToken, Engine
from worker.engine.scheduler import EngineSettings, Sequence

__all__ = ["DrawnToken", "Engine", "EngineSettings", "Sequence"]
