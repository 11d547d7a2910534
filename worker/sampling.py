"""Parameters, request and result of the sampler, which is one op of every backend.

Order: logit_bias, repetition penalty, frequency and presence penalties, masks, temperature, top-k,
top-p, min-p, draw. Ties go to the lower id. The definition is `worker/cpu/sampler.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

EngineFinishReason = Literal["stop", "length"]
"""Why the engine ends a sequence: it drew an end or stop token, or `max_tokens` tokens."""

FinishReason = Literal[EngineFinishReason, "stop_sequence"]
"""Why an answer ends: one of the engine's reasons, or a stop string in its text."""


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


class Draw(NamedTuple):
    """One drawn token.

    Log-probabilities are natural, of the raw logits over all V rows: before bias, penalties and
    masks. `top` is (id, log-probability), descending. Both are None if not requested.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None
