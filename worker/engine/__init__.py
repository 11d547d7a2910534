"""The engine: sequences in, tokens out, in synchronous steps. Token ids only, no text and no jobs.

`engine.py` runs and commits a step; `scheduler.py` starts sequences, in the order of `waiting.py`,
and chooses chunks of their prompts; `kv_blocks.py` counts the readers of KV blocks and finds those
that hold a prompt's beginning. The runner (`worker/model.py`) computes. On a GPU,
`worker/gpu/runner.py` captures the decode graphs and `worker/gpu/memory.py` accounts device memory.
"""

from worker.engine.engine import DrawnToken, Engine, FailedSequence
from worker.engine.scheduler import EngineSettings
from worker.engine.sequence import Sequence

__all__ = ["DrawnToken", "Engine", "EngineSettings", "FailedSequence", "Sequence"]
