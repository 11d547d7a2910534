"""Prompt lookup: what is proposed, for whom, and what it may cost."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.ledger_runner import DigestRunner, LookaheadRunner, alone
from tests.models import engine_of, ids, run
from worker.engine import Sequence
from worker.engine.ngram_proposer import NgramProposer
from worker.engine.speculation import EARNED, MAX_CREDIT, START_CREDIT, Speculation
from worker.model import DraftSupport
from worker.sampling import Draw

TIMES = {1: 1.0, 2: 1.0, 4: 1.2, 8: 2.0}


def proposer(*tokens):
    return NgramProposer(list(tokens), 100)


def test_the_tokens_after_an_earlier_occurrence_are_proposed():
    assert proposer(1, 2, 3, 4, 5, 6, 7, 1, 2, 3).propose(4) == [4, 5, 6, 7]


def test_the_longest_occurrence_is_taken_and_of_those_the_newest():
    assert proposer(9, 1, 2, 3, 4, 7, 1, 2, 3, 5, 9, 1, 2, 3).propose(1) == [4]
    assert proposer(8, 1, 2, 3, 4, 7, 1, 2, 3, 5, 9, 1, 2, 3).propose(1) == [5]


def test_two_common_tokens_are_too_few():
    assert proposer(1, 2, 5, 1, 2).propose(3) == []
    assert proposer(1, 1).propose(3) == []


def test_a_repetition_is_continued_beyond_the_end():
    assert proposer(5, 6, 5, 6, 5, 6).propose(5) == [5, 6, 5, 6, 5]
    assert proposer(7, 7, 7, 7).propose(3) == [7, 7, 7]


def test_an_occurrence_is_followed_until_a_token_differs():
    one = proposer(1, 2, 3, 4, 5, 6, 8, 1, 2, 3)
    assert one.propose(2) == [4, 5]
    one.append([4, 5])
    assert one.propose(2) == [6, 8]
    one.append([9])
    assert one.propose(2) == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 6))
def test_proposals_equal_those_of_a_plain_search(tokens, count):
    best, source = 2, None
    for at in range(1, len(tokens)):
        common = 0
        while common < min(8, at) and tokens[at - 1 - common] == tokens[-1 - common]:
            common += 1
        if common >= max(3, best):
            best, source = common, at
    expected = list(tokens)
    for n in range(count if source else 0):
        expected.append(expected[source + n])
    assert proposer(*tokens).propose(count) == expected[len(tokens) :]


def test_draft_tokens_fill_steps_of_four_and_eight_rows():
    support = DraftSupport(1, TIMES, 0.1)
    assert [support.spare_rows(count) for count in range(1, 10)] == [3, 2, 1, 0, 3, 2, 1, 0, 0]
    assert [support.spare_rows(count, largest=True) for count in range(1, 10)] == [7, 6, 5, 4, 3, 2, 1, 0, 0]
    assert support.cost(1, 1) == support.cost(1, 3) == pytest.approx(0.3)
    assert support.cost(5, 3) == pytest.approx(0.25)


class RepeatingRunner(DigestRunner):
    """Repeats the prompt."""

    def draw(self, request, tokens):
        return Draw(request.prompt[request.index % len(request.prompt)])


def test_steps_grow_once_a_repetition_has_lasted():
    runner = RepeatingRunner(40)
    runner.drafts = DraftSupport(0, TIMES, 0.1)
    engine = engine_of(runner, speculation="ngram")
    run(engine, Sequence("a", list(range(50)), 200))
    decodes = [len(batch.tokens) for batch in runner.batches[1:]]
    assert decodes[:4] == [1, 1, 4, 4]  # three known tokens, then two steps that prove eight more
    assert set(decodes[4:-1]) == {8}
    proposed, accepted = engine.draft_tokens
    assert proposed == accepted > 150


def test_a_repetition_keeps_small_steps_where_large_ones_cost_too_much():
    runner = RepeatingRunner(40)
    runner.drafts = DraftSupport(0, {1: 1.0, 2: 1.4, 4: 2.0, 8: 3.1}, 0.13)
    engine = engine_of(runner, speculation="ngram")
    run(engine, Sequence("a", list(range(50)), 200))
    assert {len(batch.tokens) for batch in runner.batches[30:-1]} == {4}


@pytest.mark.parametrize("every", [None, 40, 10])
@pytest.mark.parametrize("kind", [DigestRunner, LookaheadRunner])
def test_text_whose_repetitions_always_break_off_loses_at_most_the_credit_of_its_tokens(kind, every):
    chance = random.Random(3)
    blocks = [[chance.randrange(90) for _ in range(3)] for _ in range(8)]
    text = [token for n in range(150) for token in (*blocks[n % 8], 100 + n)]  # three known tokens, then a new one

    class Runner(kind):
        def draw(self, request, tokens):
            return Draw(text[request.index])

    runner = Runner(200, vocab_size=300)
    runner.drafts = DraftSupport(runner.lookahead, TIMES, 0.1)
    engine = engine_of(runner, context=2000, speculation="ngram")
    engine.add(Sequence("a", text[:40], len(text)))
    drawn, kept = [], 0
    while not engine.idle:
        drawn += [token.draw.id for token in engine.step()]
        sequence = engine._scheduler.slots[0]
        if every and sequence and not sequence.recomputed and len(drawn) >= kept + every:
            kept = len(drawn)
            runner.stop(sequence.slot)
            engine._scheduler._requeue(sequence)
    assert drawn == text
    with_drafts = sum(1 < len(batch.tokens) == len(batch.block_tables) for batch in runner.batches)
    assert with_drafts > 3
    assert 0.3 * with_drafts - engine.draft_tokens[1] <= EARNED * len(text) + START_CREDIT


@pytest.mark.parametrize("kind", [DigestRunner, LookaheadRunner])
@pytest.mark.parametrize("running", [1, 2, 3, 6])
def test_a_step_with_draft_tokens_has_at_most_eight_rows(kind, running):
    runner = kind(400)
    engine = engine_of(runner, running=running, context=2000, speculation="ngram")
    sequences = [Sequence(str(n), [n, *range(20)] * 2, 90) for n in range(running)]
    answers = run(engine, *sequences)
    assert all(ids(answers[each.id]) == alone(each.prompt, 90) for each in sequences)
    decodes = [len(batch.tokens) for batch in runner.batches if len(batch.tokens) == len(batch.block_tables)]
    assert 4 <= max(decodes) <= 8
    assert engine.draft_tokens[1] > 0


def test_nothing_is_proposed_while_ids_are_replayed():
    runner = DigestRunner(40)
    whole = alone(list(range(9)) * 2, 40)
    engine = engine_of(runner, speculation="ngram")
    answer = run(engine, Sequence("a", list(range(9)) * 2, 40, replay=whole[:25]))["a"]
    assert ids(answer) == whole
    decodes = [len(batch.tokens) for batch in runner.batches[1:]]
    assert decodes[:24] == [1] * 24
    assert max(decodes) > 1


def test_a_runner_without_support_runs_as_before():
    runner = DigestRunner(40)
    runner.drafts = None
    engine = engine_of(runner, speculation="ngram")
    assert ids(run(engine, Sequence("a", list(range(9)) * 2, 20))["a"]) == alone(list(range(9)) * 2, 20)
    assert engine.draft_tokens == (0, 0)


def test_credit_is_bounded():
    sequence = Sequence("a", list(range(30)), 4000)
    sequence.ids = np.arange(30, dtype=np.int32)
    sequence.slot, sequence.prefilled = 0, 30
    speculation = Speculation(DraftSupport(0, TIMES, 0.1))
    sequence.generated = [0]
    speculation.propose([sequence], 1)
    sequence.generated = list(range(30)) * 30
    speculation.propose([sequence], 1)
    assert speculation._drafting[sequence].credit <= MAX_CREDIT
