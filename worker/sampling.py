"""What a draw is: the sampler's parameters, request and result, as one op of every backend.

The order is fixed: logit_bias, repetition then frequency/presence penalties, masks, temperature, top-k, top-p, min-p,
draw. Ties go to the lower id everywhere. The definition is `worker/cpu/sampler.py`; `worker/engine/` makes requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

EngineFinishReason = Literal["stop", "length"]
"""Why the engine ends a sequence: an end token was drawn, or `max_tokens` were."""

FinishReason = Literal[EngineFinishReason, "stop_sequence"]
"""Why an answer ends: one of the engine's reasons, or a stop string in its text."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence is sampled, every field resolved and checked by whoever made the request."""

    temperature: float = 1.0
    """0 is greedy: the highest logit, no division and no random number."""
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
    """Whether the penalties count the prompt's tokens too, not the generated ones alone."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    """Philox key, uint64."""
    min_tokens: int = 0
    """End tokens are masked for the draws of index below it."""
    ignore_eos: bool = False
    """An end token is drawn and published like any other and does not end the answer."""
    logprobs: int | None = None
    """Alternatives reported with each token; None reports no log-probabilities at all."""


@dataclass(frozen=True, slots=True)
class DrawRequest:
    """Draw the token of index `index` for a sequence whose `prompt` and `generated` ids these are.

    A `forced` id was published by an earlier attempt: it is taken as it is, and nothing is drawn.
    """

    sampling: Sampling
    index: int
    prompt: Sequence[int]
    generated: Sequence[int]
    forced: int | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """One drawn token. Log-probabilities are natural, of the raw logits over all V rows, before bias, penalty, mask.

    `top` holds (id, log-probability) by falling log-probability; both are None unless they were asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None
