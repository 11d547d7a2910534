"""One answer in the making: its prompt, what it drew so far, and the KV blocks it owns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from worker.engine.prefix_index import ROOT
from worker.ops import Ints
from worker.sampling import DrawRequest, Sampling

FinishReason = Literal["stop", "length"]
"""An end token was drawn, or `max_tokens` were."""


@dataclass(slots=True)
class Sequence:
    """A prompt to be continued by at most `max_tokens` tokens, ended by any of `end_ids`.

    `replay` holds tokens that an earlier attempt published: they are taken as drawn, through the decode path, and the
    first new one is of index len(replay). The engine writes the remaining fields.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_ids: frozenset[int] = frozenset()
    replay: list[int] = field(default_factory=list)

    generated: list[int] = field(default_factory=list, init=False)
    prefilled: int = field(default=0, init=False)
    """Prompt tokens whose K and V are there: computed, or found in the prefix cache."""
    contents: list[bytes] = field(default_factory=list, init=False)
    """Of the prompt's whole blocks; empty where nothing of it is to be cached."""
    place: int = field(default=ROOT, init=False)
    """In the prefix index, after the whole blocks that are there."""
    block_table: Ints | None = field(default=None, init=False)

    @property
    def in_prefill(self) -> bool:
        """Whether prompt tokens are left to compute."""
        return self.prefilled < len(self.prompt)

    def next_draw(self) -> DrawRequest:
        """The request for the token of index len(generated)."""
        index = len(self.generated)
        forced = self.replay[index] if index < len(self.replay) else None
        return DrawRequest(self.sampling, index, self.prompt, self.generated, forced)

    def finish_at(self, index: int, token: int) -> FinishReason | None:
        """Why the answer ends with `token` as its token of index `index`, or None if it goes on."""
        if token in self.end_ids and not self.sampling.ignore_eos:
            return "stop"
        return "length" if index + 1 >= self.max_tokens else None
