"""Sequences: what the caller gives the engine, and what scheduler and engine keep of each.

Next: `waiting.py`, `scheduler.py`.
"""

from dataclasses import dataclass, field

import numpy as np

from worker.engine.kv_blocks import ROOT
from worker.ops import Ints
from worker.sampling import EngineFinishReason, Sampling

NO_SLOT = -1


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """A prompt to be continued by at most `max_tokens` tokens, ended by any of `end_ids`.

    `replay` holds tokens that an earlier attempt published. The decode path computes them without
    drawing, and the first new token has the index len(replay). The scheduler and the engine write
    the fields after `tenant`.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_ids: frozenset[int] = frozenset()
    replay: list[int] = field(default_factory=list)
    priority: int = 0
    """0 (most urgent) to 9: the order in which sequences start."""
    tenant: str = ""
    """Among waiting sequences of equal priority, tenants take turns."""

    ends: frozenset[int] = field(init=False)
    """Ids that end the sequence; `ignore_eos` and `stop_token_ids` are applied."""
    generated: list[int] = field(default_factory=list, init=False)
    """The ids that `Engine.step` has returned."""
    ids: Ints = field(default_factory=lambda: np.empty(0, np.int32), init=False)
    """The prompt as an array."""
    prefilled: int = field(default=0, init=False)
    """Prompt tokens whose K and V are in `block_table`: computed, or found in the prefix cache."""
    full_blocks: list[bytes] = field(default_factory=list, init=False)
    """The ids of the prompt's full blocks; empty if none of them may enter the prefix cache."""
    reusable: int = field(default=0, init=False)
    """Maximum number of cached blocks that the sequence may hold when it starts."""
    prefix_node: int = field(default=ROOT, init=False)
    """The node of the prefix index that stands for the full blocks up to `prefilled`."""
    block_table: Ints | None = field(default=None, init=False)
    """The blocks that the sequence holds: before the start those of the cached prefix, afterwards
    those of all its tokens and some more; None where no block is held."""
    slot: int = field(default=NO_SLOT, init=False)
    """Its slot while it runs."""
    recomputed: int = field(default=0, init=False)
    """Ids of `generated` that the runner has not yet returned again since the last start."""
    room: int = field(default=0, init=False)
    """Tokens that the runner may return before the block table must grow."""
    arrival: int = field(default=0, init=False)
    """Number in the order of `add` and `resume`."""
    queued_at: int = field(default=0, init=False)
    """The step before which the sequence was added or resumed."""
    chunk_at: int = field(default=0, init=False)
    """The step of its last chunk."""
    preempted: bool = field(default=False, init=False)
    """Whether it ran before and waits for another start."""

    def __post_init__(self) -> None:
        ends = frozenset[int]() if self.sampling.ignore_eos else self.end_ids
        self.ends = ends | self.sampling.stop_token_ids

    @property
    def known(self) -> list[int]:
        """The ids after the prompt that need no draw: generated, or published by an attempt."""
        return self.generated if len(self.generated) > len(self.replay) else self.replay

    def finish_at(self, index: int, token: int) -> EngineFinishReason | None:
        """Why the sequence ends with `token` at index `index`, or None if it continues."""
        if token in self.ends:
            return "stop"
        return "length" if index + 1 >= self.max_tokens else None
