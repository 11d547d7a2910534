"""One sequence: its prompt, the tokens drawn so far, and the KV blocks that it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from worker.engine.prefix_index import ROOT
from worker.ops import Ints
from worker.sampling import DrawRequest, EngineFinishReason, Sampling


@dataclass(slots=True)
class Sequence:
    """A prompt to be continued by at most `max_tokens` tokens, ended by any of `end_ids`.

    `replay` holds tokens that an earlier attempt published. The decode path computes them without
    drawing, and the first new token has the index len(replay). The scheduler and the engine write
    the remaining fields.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_ids: frozenset[int] = frozenset()
    replay: list[int] = field(default_factory=list)

    generated: list[int] = field(default_factory=list, init=False)
    prefilled: int = field(default=0, init=False)
    """Prompt tokens whose K and V are in `block_table`: computed, or found in the prefix cache."""
    full_blocks: list[bytes] = field(default_factory=list, init=False)
    """The ids of the prompt's full blocks; empty if none of them may enter the prefix cache."""
    prefix_node: int = field(default=ROOT, init=False)
    """The node of the prefix index that stands for the full blocks up to `prefilled`."""
    block_table: Ints | None = field(default=None, init=False)
    """Before the start the blocks of the cached prefix, from the start all blocks of the sequence;
    None where no block is held."""

    @property
    def in_prefill(self) -> bool:
        """Whether prompt tokens are left to compute."""
        return self.prefilled < len(self.prompt)

    def next_draw(self) -> DrawRequest:
        """The request for the token of index len(generated)."""
        index = len(self.generated)
        forced = self.replay[index] if index < len(self.replay) else None
        return DrawRequest(self.sampling, index, self.prompt, self.generated, forced)

    def finish_at(self, index: int, token: int) -> EngineFinishReason | None:
        """Why the sequence ends with `token` at index `index`, or None if it continues."""
        if token in self.end_ids and not self.sampling.ignore_eos:
            return "stop"
        return "length" if index + 1 >= self.max_tokens else None
