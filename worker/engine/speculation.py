"""Speculative decoding with prompt lookup: which draft tokens the next decode step verifies.

Verification (`Runner.propose`) changes no draw, only how many a step returns. So the decision here
is about time alone: a sequence speculates on credit. Each of its tokens earns EARNED, each accepted
draft token earns 1, and a step with draft tokens costs what `DraftSupport.cost` estimates. Without
credit nothing is proposed, so an answer loses at most EARNED of its time, and that of START_CREDIT
tokens, however often it is preempted. Exact matching of sampled tokens: Leviathan et al. 2023,
arXiv:2211.17192, with a draft model that is certain. Read first: `ngram_proposer.py`.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from weakref import WeakKeyDictionary

from worker.engine.ngram_proposer import NgramProposer
from worker.engine.sequence import Sequence
from worker.model import DraftSupport

DRAFT_TOKENS, MORE_DRAFT_TOKENS = 3, 7
"""Draft tokens of a sequence in a step at most: of a short repetition, and of one that has lasted
for LASTING tokens. They are ahead of the returned tokens by less than a KV block."""
LASTING = 8
EARNED = 0.01
"""Credit of a generated token, in tokens: the largest share of its speed that a sequence loses."""
START_CREDIT = 1.0
MAX_CREDIT = 2.0
"""Text that stops repeating itself loses at most this many tokens of what it had gained."""


@dataclass(slots=True)
class _Drafting:
    """What is known of a sequence since it was first able to speculate."""

    proposer: NgramProposer
    credit: float = START_CREDIT
    used: int = 0
    """Generated tokens that `proposer` has."""


@dataclass(slots=True, eq=False)
class _Proposal:
    """Draft tokens of one sequence in one step."""

    sequence: Sequence
    drafting: _Drafting
    ids: list[int]
    generated: int = 0
    """Tokens that the sequence had before the step's draws were returned."""


class Speculation:
    """Proposes draft tokens for each step, and counts how many were accepted."""

    def __init__(self, support: DraftSupport) -> None:
        self.proposed = self.accepted = 0
        self._support = support
        self._drafting: WeakKeyDictionary[Sequence, _Drafting] = WeakKeyDictionary()
        """Of all sequences that are not ended, also while they wait or ids are replayed."""
        self._launched: deque[list[_Proposal]] = deque()
        """Of the steps whose draws are not returned, oldest first."""

    @property
    def margin(self) -> int:
        """Tokens by which K and V of draft tokens may run ahead of the returned tokens."""
        return (1 + self._support.lookahead) * MORE_DRAFT_TOKENS

    def propose(self, generating: Iterable[Sequence], count: int) -> list[tuple[int, list[int]]]:
        """Slots and draft tokens for the next step, in which at most `count` sequences generate."""
        in_flight = {each.sequence: each.ids for each in self._launched[-1]} if self._launched else {}
        proposals: list[_Proposal] = []
        most = self._support.spare_rows(count, largest=True)
        if most:
            drafting = {each: self._updated(each) for each in generating if _may_speculate(each)}
            cost = self._support.cost(count, most)
            affordable = (each for each in drafting.values() if each.credit >= cost)
            lasting = any(each.proposer.followed >= LASTING for each in affordable)
            spare = self._support.spare_rows(count, largest=lasting)
            least = self._support.cost(count, 1) / max(1, min(spare, len(drafting)))
            for sequence, state in drafting.items():
                if spare and state.credit >= least:
                    ids = self._next_ids(sequence, state.proposer, in_flight.get(sequence, []), spare)
                    spare -= len(ids)
                    proposals += [_Proposal(sequence, state, ids)] if ids else []
        chosen = self._affordable(proposals, count)
        self._launched.append(chosen)
        return [(each.sequence.slot, each.ids) for each in chosen]

    def returned(self) -> list[_Proposal]:
        """The proposals whose draws the last run has returned; those are not yet committed."""
        proposals = self._launched.popleft() if len(self._launched) > self._support.lookahead else []
        for each in proposals:
            each.generated = len(each.sequence.generated)
        return proposals

    def count(self, proposals: Iterable[_Proposal]) -> None:
        """Count accepted tokens, once the draws of `returned` proposals are committed."""
        for each in proposals:
            new = len(each.sequence.generated) - each.generated
            if new:  # otherwise the sequence was stopped meanwhile
                self.proposed += len(each.ids)
                self.accepted += new - 1
                each.drafting.credit = min(MAX_CREDIT, each.drafting.credit + new - 1)

    def reset(self) -> None:
        """Drop all proposals, after a step that failed."""
        self._launched.clear()

    def _updated(self, sequence: Sequence) -> _Drafting:
        """The state of a sequence, with its new tokens. Tokens before it began earn nothing."""
        state = self._drafting.get(sequence)
        if state is None:
            state = _Drafting(NgramProposer(sequence.ids, len(sequence.prompt) + sequence.max_tokens))
            state.proposer.append(sequence.generated)
            state.used = len(sequence.generated)
            self._drafting[sequence] = state
        new = sequence.generated[state.used :]
        state.used += len(new)
        state.proposer.append(new)
        state.credit = min(MAX_CREDIT, state.credit + EARNED * len(new))
        return state

    def _next_ids(self, sequence: Sequence, proposer: NgramProposer, in_flight: list[int], spare: int) -> list[int]:
        """Draft tokens after those that the step in flight is expected to draw."""
        lookahead = self._support.lookahead
        count = MORE_DRAFT_TOKENS if proposer.followed >= LASTING else DRAFT_TOKENS
        expected = proposer.propose(lookahead * (1 + len(in_flight)) + count)
        agreed = takewhile(lambda pair: pair[0] == pair[1], zip(in_flight, expected, strict=False))
        skipped = lookahead * (1 + sum(1 for _ in agreed))
        left = sequence.max_tokens - len(sequence.generated) - skipped - 1
        return expected[skipped : skipped + min(count, spare, max(0, left))]

    def _affordable(self, proposals: list[_Proposal], count: int) -> list[_Proposal]:
        """The proposals whose sequences pay an equal share of the step's cost, which is charged."""
        while proposals:
            share = self._support.cost(count, sum(len(each.ids) for each in proposals)) / len(proposals)
            paying = [each for each in proposals if each.drafting.credit >= share]
            if len(paying) == len(proposals):
                for each in proposals:
                    each.drafting.credit -= share
                break
            proposals = paying
        return proposals


def _may_speculate(sequence: Sequence) -> bool:
    """Whether a generating sequence draws new tokens, since all of its known ids are replayed.

    With a grammar it does not speculate: the mask after a draft token would delay the step.
    """
    if sequence.recomputed or sequence.sampling.grammar is not None:
        return False
    return len(sequence.generated) >= max(1, len(sequence.replay))
