"""Parameters, request and result of the sampler, which is one op of every backend.

Order: logit_bias, repetition penalty, frequency and presence penalties, masks, temperature, top-k,
top-p, min-p, draw. Ties go to the lower id. The definition is `worker/cpu/sampler.py`.

A `Grammar` restricts a sequence's tokens to those that its `TokenMask` allows. The implementation
is `worker/text/grammar.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EngineFinishReason = Literal["stop", "length"]
"""Why the engine ends a sequence: it drew an end or stop token, or `max_tokens` tokens."""

FinishReason = Literal[EngineFinishReason, "stop_sequence"]
"""Why an answer ends: one of the engine's reasons, or a stop string in its text."""


class TokenMask(Protocol):
    """The tokens that may follow in one sequence: a function of the grammar and the accepted ids.

    One thread at a time calls the methods, not always the same one. Any exception, also a
    BaseException of native code, ends this sequence alone, with the code INVALID_REQUEST.
    """

    def accept(self, token_id: int) -> None:
        """Append an id that was drawn or replayed.

        Every id is passed in order, except the one that ends the sequence: an end token (unless
        `ignore_eos`), an id of `stop_token_ids`, or the last of `max_tokens`.

        Raises:
            InvalidRequest: The grammar does not allow the id: what, and after which token.
        """

    def fill(self, mask: NDArray[np.uint32]) -> None:
        """Write all ⌈V/32⌉ words: bit i % 32 of word i // 32 is set if id i is allowed next.

        End tokens are allowed if the grammar may end here. Bits of ids that the grammar's
        vocabulary does not have are zero.

        Raises:
            InvalidRequest: The matcher has failed, or it exceeded a limit.
        """


class Grammar(Protocol):
    """A compiled grammar: immutable, and shared by sequences and threads."""

    def start(self) -> TokenMask:
        """The mask of a sequence without generated tokens."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one sequence, with defaults applied and ranges checked."""

    temperature: float = 1.0
    """0 is greedy: the highest logit, without a random number."""
    top_k: int = 0
    """Keep the k likeliest; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probability reaches top_p; 0 keeps one."""
    min_p: float = 0.0
    """Keep tokens of at least min_p times the likeliest one's probability."""
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalize_prompt: bool = False
    """Whether the penalties also count the prompt's tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    """Philox key, uint64."""
    min_tokens: int = 0
    """End tokens and `stop_token_ids` are masked in draws with a lower index."""
    ignore_eos: bool = False
    """Publish end tokens like other tokens, without ending the answer."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer besides the end tokens, with `ignore_eos` too."""
    logprobs: int | None = None
    """Number of alternatives reported with each token; None reports no log-probabilities."""
    grammar: Grammar | None = None
    """Restricts the generated tokens. Masked with the padding rows and end tokens."""


@dataclass(frozen=True, slots=True)
class DrawRequest:
    """Draw token `index` of the sequence with ids `prompt` and `generated`.

    A `forced` id was published by an earlier attempt and is returned without a draw.
    """

    sampling: Sampling
    index: int
    prompt: Sequence[int]
    generated: Sequence[int]
    forced: int | None = None
    allowed: NDArray[np.uint32] | None = None
    """The mask of the draw, as `TokenMask.fill` writes it; None allows all ids."""


class Draw(NamedTuple):
    """One drawn token.

    Log-probabilities are natural, of the raw logits over all V rows: before bias, penalties and
    masks. `top` is (id, log-probability), descending. Both are None if not requested.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None
