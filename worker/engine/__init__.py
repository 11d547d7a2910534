"""The engine: sequences in, tokens out, in synchronous steps. Token ids only, no text and no jobs.

`engine.py` runs and commits a step; `scheduler.py` admits sequences and chooses the batch;
`kv_blocks.py` counts the readers of KV blocks; `prefix_index.py` finds the blocks that hold a
prompt's beginning.
"""

from worker.engine.engine import DrawnToken, Engine
from worker.engine.scheduler import EngineSettings
from worker.engine.sequence import Sequence

__all__ = ["DrawnToken", "Engine", "EngineSettings", "Sequence"]
