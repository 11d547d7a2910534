"""Sequences with grammars in an engine on the CPU: masks, their faults, preemption and takeover."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.random_jobs import RandomJob, draws_alone, run_beside
from tests.grammars import DigestGrammar, FaultyGrammar, ListGrammar, NativePanic
from tests.models import cpu_runner, engine_of, ids, run
from worker.echo import EchoRunner
from worker.engine import FailedSequence, Sequence
from worker.errors import InvalidRequest
from worker.sampling import Sampling

VOCABULARY = 280
PROMPT = [7, 3, 9, 4]


@pytest.fixture(scope="module")
def runner(tiny):
    return cpu_runner(tiny("qwen2"), kv_blocks=200, slots=8, padding_ids=[VOCABULARY - 1])


def outcome(engine, *sequences):
    """The ids of each sequence, and the errors of those that failed."""
    for sequence in sequences:
        engine.add(sequence)
    drawn, errors = {each.id: [] for each in sequences}, {}
    while not engine.idle:
        for token in engine.step():
            if isinstance(token, FailedSequence):
                errors[token.sequence_id] = token.error
            else:
                drawn[token.sequence_id].append(token.draw.id)
    return drawn, errors


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_drawn_id_is_one_that_the_grammar_allows(runner, temperature):
    grammar = DigestGrammar(VOCABULARY - 1, 4)
    sampling = Sampling(temperature=temperature, seed=5, grammar=grammar)
    free = Sampling(temperature=temperature, seed=5)
    drawn = ids(run(engine_of(runner), Sequence("a", PROMPT, 40, sampling))["a"])
    assert len(drawn) == 40
    assert all(grammar.allowed(drawn[:index])[token] for index, token in enumerate(drawn))
    assert drawn != ids(run(engine_of(runner), Sequence("a", PROMPT, 40, free))["a"])


def test_log_probabilities_are_those_of_the_raw_logits(runner):
    free = Sampling(temperature=0, logprobs=20)
    (draw,) = (token.draw for token in run(engine_of(runner), Sequence("a", PROMPT, 1, free))["a"])
    other, logprob = draw.top[9]
    assert other not in (draw.id, VOCABULARY - 1)
    masked = Sampling(temperature=0, logprobs=20, grammar=ListGrammar(((other,),), VOCABULARY))
    (token,) = run(engine_of(runner), Sequence("a", PROMPT, 1, masked))["a"]
    assert token.draw == (other, logprob, draw.top)


def test_a_takeover_continues_with_the_ids_of_the_first_attempt(runner):
    sampling = Sampling(temperature=1.0, seed=3, grammar=DigestGrammar(VOCABULARY - 1, 8))
    whole = ids(run(engine_of(runner), Sequence("a", PROMPT, 24, sampling))["a"])
    for taken in (1, 11, 23):
        resumed = Sequence("a", PROMPT, 24, sampling, replay=whole[:taken])
        assert ids(run(engine_of(runner), resumed)["a"]) == whole


def test_an_end_token_ends_a_sequence_whose_grammar_allows_it(runner):
    grammar = ListGrammar(((5,), (6,), (8,)), VOCABULARY)
    tokens = run(engine_of(runner), Sequence("a", PROMPT, 9, Sampling(grammar=grammar), frozenset({8})))["a"]
    assert ids(tokens) == [5, 6, 8]
    assert tokens[-1].finish == "stop"


@pytest.mark.parametrize("fault", ["start", "fill", "accept", "empty"])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_fault_of_one_matcher_ends_its_sequence_alone(runner, fault, at):
    jobs = [
        Sequence("faulty", PROMPT, 12, Sampling(seed=1, grammar=FaultyGrammar(VOCABULARY - 1, fault=fault, at=at))),
        Sequence("masked", PROMPT, 12, Sampling(seed=2, grammar=DigestGrammar(VOCABULARY - 1, 9))),
        Sequence("free", PROMPT, 12, Sampling(seed=3)),
    ]
    alone = {each.id: ids(run(engine_of(runner), each)[each.id]) for each in jobs[1:]}
    again = [Sequence(each.id, each.prompt, 12, each.sampling) for each in jobs]
    engine = engine_of(runner, running=3)
    drawn, errors = outcome(engine, *again)
    assert {name: drawn[name] for name in alone} == alone
    assert list(errors) == ["faulty"]
    assert isinstance(errors["faulty"], InvalidRequest)
    index = 0 if fault == "start" else at
    assert f"index {index} of the answer" in errors["faulty"].message
    assert len(drawn["faulty"]) == index + (fault == "accept")
    assert engine.kv_blocks["used"] == 0


def test_the_blocks_of_a_prompt_whose_sequence_failed_at_once_may_be_shared(runner):
    prompt = list(range(40))
    engine = engine_of(runner)
    alone = ids(run(engine_of(runner), Sequence("a", prompt, 5, Sampling(seed=1)))["a"])
    _, errors = outcome(engine, Sequence("f", prompt, 5, Sampling(grammar=FaultyGrammar(VOCABULARY, fault="start"))))
    assert errors
    later = Sequence("a", prompt, 5, Sampling(seed=1))
    assert engine.add(later) > 0, "the prompt is in the prefix cache"
    drawn = []
    while not engine.idle:
        drawn += [token.draw.id for token in engine.step()]
    assert drawn == alone


def test_replayed_ids_that_the_grammar_refuses_end_the_sequence(runner):
    sampling = Sampling(grammar=ListGrammar(((5,), (6,)), VOCABULARY))
    drawn, errors = outcome(engine_of(runner), Sequence("a", PROMPT, 9, sampling, replay=[5, 7, 6, 6]))
    assert drawn["a"] == [5, 7]
    assert errors["a"].message == "response_format: id 7 is not allowed (at index 1 of the answer)"


@pytest.mark.parametrize("running", [1, 3, 8])
def test_jobs_with_and_without_grammars_draw_the_same_bits_alone_and_side_by_side(runner, running):
    jobs = grammar_jobs(30, running)
    outcome = run_beside(runner, jobs, running, 60, preempt=0.05)
    assert outcome.draws == draws_alone(runner, jobs)
    assert outcome.preempted


def grammar_jobs(count, seed):
    """Jobs of which two thirds have a grammar; none is aborted."""
    rng = np.random.default_rng(seed)
    jobs = []
    for number in range(count):
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, 40)).tolist()
        grammar = DigestGrammar(VOCABULARY - 1, number) if number % 3 else None
        sampling = Sampling(temperature=number % 2, seed=number, top_p=0.9, logprobs=2, grammar=grammar)
        jobs.append(RandomJob(str(number), prompt, int(rng.integers(1, 30)), sampling, frozenset(), None))
    return jobs


def test_a_sequence_with_a_grammar_has_no_draft_tokens(runner):
    grammar = ListGrammar(((5, 6, 7), (5, 6)), VOCABULARY)
    engine = engine_of(runner, speculation="ngram")
    assert len(run(engine, Sequence("a", [5] * 30, 30, Sampling(temperature=0, grammar=grammar)))["a"]) == 30
    assert engine.draft_tokens == (0, 0)


def test_the_echo_model_refuses_a_grammar():
    runner = EchoRunner(VOCABULARY, 10, slots=2)
    sampling = Sampling(grammar=FaultyGrammar(VOCABULARY, error=NativePanic()))
    drawn, errors = outcome(
        engine_of(runner, running=2, context=160), Sequence("a", PROMPT, 4, sampling), Sequence("b", PROMPT, 4)
    )
    assert drawn == {"a": [], "b": PROMPT}
    assert errors["a"].code == "INVALID_REQUEST"
