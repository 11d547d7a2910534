"""The sampler's definition on NumPy: one row of logits and a request in, one draw out.

The parameters and their order are those of `worker/sampling.py`. Probabilities are f64, so that
they sum to 1 within 1e-9. Random numbers are Philox4x32-10 (Salmon et al., SC'11): draw i with seed
s is block (i, 0, 0, 0) under key s, so a worker that continues an answer draws the same tokens.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from worker.errors import Internal
from worker.sampling import Draw, DrawRequest, Sampling
from worker.token_masks import SlotMasks

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Block = tuple[int, int, int, int]


class Sampler:
    """Draws for one vocabulary.

    Masks the padding rows, ids that the request does not allow, and end and stop tokens before
    `min_tokens`.
    """

    def __init__(self, vocab_size: int, padding_ids: Iterable[int], end_ids: Iterable[int]) -> None:
        self.vocab_size = vocab_size
        self._padding = np.fromiter((i for i in padding_ids if i < vocab_size), np.int64)
        self._ends = np.fromiter((i for i in end_ids if i < vocab_size), np.int64)
        self.masks = SlotMasks(vocab_size, self._padding.tolist(), self._ends.tolist())
        """Starts the masks of sequences that have a grammar."""

    def draw(self, logits: F32, request: DrawRequest) -> Draw:
        """Draw a token from `logits` [V], not modified. Raises Internal if none is finite."""
        if request.forced is not None:
            return Draw(request.forced)
        params = request.sampling
        scores = self._masked(_penalized(logits, request), request)
        if not np.isfinite(scores.max()):
            raise Internal("the model's logits are not finite, so no token can be drawn")
        token = int(np.argmax(scores)) if params.temperature == 0 else _drawn(scores, params, request.index)
        if params.logprobs is None:
            return Draw(token)
        logprobs = log_softmax(logits)
        top = tuple((int(i), float(logprobs[i])) for i in _largest(logprobs, params.logprobs))
        return Draw(token, float(logprobs[token]), top)

    def _masked(self, scores: F64, request: DrawRequest) -> F64:
        scores[self._padding] = -np.inf
        if request.allowed is not None:
            bits = np.unpackbits(request.allowed.view(np.uint8), count=len(scores), bitorder="little")
            scores[bits == 0] = -np.inf
        if request.index < request.sampling.min_tokens:
            scores[self._ends] = -np.inf
            scores[list(request.sampling.stop_token_ids)] = -np.inf
        return scores


def log_softmax(logits: F32) -> F64:
    """Natural log-probabilities [V] of raw logits."""
    shifted = logits.astype(np.float64) - np.float64(logits.max())
    result: F64 = shifted - np.log(np.exp(shifted).sum())
    return result


def _penalized(logits: F32, request: DrawRequest) -> F64:
    """Scores [V] f64, a copy: bias, repetition penalty, then frequency and presence penalties.

    The repetition penalty applies once to each distinct token.
    """
    params = request.sampling
    scores = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if params.repetition_penalty == 1 and params.frequency_penalty == 0 and params.presence_penalty == 0:
        return scores
    seen = [*request.prompt, *request.generated] if params.penalize_prompt else request.generated
    ids, counts = np.unique(np.asarray(seen, np.int64), return_counts=True)
    at = scores[ids]
    at = np.where(at > 0, at / params.repetition_penalty, at * params.repetition_penalty)
    scores[ids] = at - counts * params.frequency_penalty - params.presence_penalty
    return scores


def _drawn(scores: F64, params: Sampling, index: int) -> int:
    """Inverse-CDF draw in id order: the first token whose cumulative probability exceeds u."""
    kept, probs = distribution(scores, params)
    cumulative = np.cumsum(probs)
    at = int(np.searchsorted(cumulative, uniform(params.seed, index) * cumulative[-1], side="right"))
    return int(kept[min(at, len(kept) - 1)])


def philox4x32(counter: Block, key: tuple[int, int]) -> Block:
    """Four uint32 from a counter of four uint32 and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """The u in [0, 1) of a draw: the high 24 bits of the first uint32, exact in f32."""
    x0, *_ = philox4x32((index & _MASK, 0, 0, 0), (seed & _MASK, seed >> 32 & _MASK))
    return (x0 >> 8) * 2.0**-24


def distribution(scores: F64, params: Sampling) -> tuple[Ids, F64]:
    """Apply temperature, top-k, top-p, min-p: the kept ids, ascending, and their probabilities."""
    with np.errstate(over="ignore"):  # a tiny temperature: all but the highest become -inf, as intended
        scaled = (scores - scores.max()) / params.temperature
    kept: Ids = np.flatnonzero(scores > -np.inf)
    if 0 < params.top_k < len(kept):
        kept = np.sort(_largest(scaled, params.top_k))
    probs = _softmax(scaled[kept])
    if params.top_p < 1:
        inside = _nucleus(scaled[kept], probs, params.top_p)
        kept, probs = kept[inside], probs[inside] / probs[inside].sum()
    if params.min_p > 0:
        inside = np.flatnonzero(probs >= params.min_p * probs.max())
        kept, probs = kept[inside], probs[inside] / probs[inside].sum()
    return kept, probs


def _softmax(scores: F64) -> F64:
    weights = np.exp(scores - scores.max())
    result: F64 = weights / weights.sum()
    return result


def _nucleus(scores: F64, probs: F64, top_p: float) -> Ids:
    """Ascending indices of the fewest likeliest entries, at least one, whose sum reaches `top_p`.

    Nucleus sampling (Holtzman et al. 2020). Entries are ordered by score, which distinguishes
    entries whose probabilities round to the same number.
    """
    order = np.argsort(-scores, kind="stable")
    count = int(np.searchsorted(np.cumsum(probs[order]), top_p, side="left")) + 1
    return np.sort(order[:count])


def _largest(values: F64, count: int) -> Ids:
    """Indices of the `count` largest values, descending, ties by index; NaN and -inf last."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    if count <= 0:
        return np.empty(0, np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    ties = np.flatnonzero(values == threshold)[: count - len(above)]
    chosen = np.concatenate([above, ties])
    result: Ids = chosen[np.lexsort((chosen, -values[chosen]))]
    return result
