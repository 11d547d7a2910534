"""Sequences with grammars on the GPU: masks, their faults, neighbours, preemption and takeover."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.random_jobs import RandomJob, draws_alone, run_beside, run_jobs
from tests.engine.test_grammars import outcome
from tests.gpu.chain import BLOCKS, BROKEN, CONTEXT, VOCABULARY, chain_runner
from tests.grammars import DigestGrammar, FaultyGrammar, ListGrammar
from tests.models import engine_of, ids, run
from worker.engine import FailedSequence, Sequence
from worker.model import DraftSupport
from worker.sampling import Sampling

PROMPT = [7, 3, 9, 4]


@pytest.fixture
def chain(kernels, memory):
    """A function that makes a runner of the chain, with slots."""
    return lambda slots=1, **settings: chain_runner(kernels, memory, slots, **settings)


def engine_over(runner, running=1, **settings):
    return engine_of(runner, context=CONTEXT, running=running, **settings)


def jobs_with_grammars(count, seed, size, tokens=20):
    """Jobs of which two thirds have a grammar, half of them greedy; none is aborted."""
    rng = np.random.default_rng(seed)
    jobs = []
    for number in range(count):
        prompt = rng.integers(0, size, rng.integers(1, 40)).tolist()
        grammar = DigestGrammar(size, number) if number % 3 else None
        warm = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}
        parameters = warm if number % 2 else {"temperature": 0.0}
        sampling = Sampling(seed=number, logprobs=2 if number % 5 else None, grammar=grammar, **parameters)
        jobs.append(RandomJob(str(number), prompt, int(rng.integers(1, tokens)), sampling, frozenset(), None))
    return jobs


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_drawn_id_is_one_that_the_grammar_allows(temperature, chain):
    grammar = DigestGrammar(BROKEN, 4)
    sampling = Sampling(temperature=temperature, seed=5, grammar=grammar)
    drawn = ids(run(engine_over(chain()), Sequence("a", PROMPT, 40, sampling))["a"])
    assert len(drawn) == 40
    assert all(grammar.allowed(drawn[:index])[token] for index, token in enumerate(drawn))


def test_log_probabilities_are_those_of_the_raw_logits(chain):
    runner, free = chain(), Sampling(temperature=0, logprobs=20)
    (draw,) = (token.draw for token in run(engine_over(runner), Sequence("a", PROMPT, 1, free))["a"])
    other, logprob = draw.top[9]
    masked = Sampling(temperature=0, logprobs=20, grammar=ListGrammar(((other,),), VOCABULARY))
    (token,) = run(engine_over(runner), Sequence("a", PROMPT, 1, masked))["a"]
    assert token.draw == (other, logprob, draw.top)


@pytest.mark.parametrize("running", [1, 3, 8])
def test_jobs_with_and_without_grammars_draw_the_same_bits_alone_and_side_by_side(running, chain):
    jobs = jobs_with_grammars(24, running, BROKEN)
    beside = run_beside(chain(running), jobs, running, BLOCKS, context=CONTEXT, chunks=(16, 64), preempt=0.05)
    assert beside.draws == draws_alone(chain(), jobs, CONTEXT)
    assert beside.preempted


def test_steps_without_a_sequence_with_a_grammar_are_computed_ahead_and_launch_no_second_draw(chain, monkeypatch):
    runner, drawn = chain(2), []
    monkeypatch.setattr(runner, "_draw_masked", drawn.append)
    run(engine_over(runner, 2), Sequence("a", PROMPT, 9), Sequence("b", PROMPT, 5))
    assert not drawn
    sampling = Sampling(grammar=ListGrammar(((5,),), VOCABULARY))
    replayed = Sequence("c", PROMPT, 5, sampling, replay=[5] * 4)
    engine = engine_over(runner, 2)
    engine.add(replayed)
    for _ in range(3):
        engine.step()
    assert not drawn, "replayed ids need no mask"


def test_a_takeover_continues_with_the_ids_of_the_first_attempt(chain):
    sampling = Sampling(temperature=1.0, seed=3, grammar=DigestGrammar(BROKEN, 8))
    whole = ids(run(engine_over(chain()), Sequence("a", PROMPT, 24, sampling))["a"])
    for taken in (1, 11, 23):
        resumed = Sequence("a", PROMPT, 24, sampling, replay=whole[:taken])
        assert ids(run(engine_over(chain(3), 3), resumed)["a"]) == whole


def test_an_end_token_ends_a_sequence_whose_grammar_allows_it(chain):
    grammar = ListGrammar(((5,), (6,), (8,)), VOCABULARY)
    engine = engine_over(chain(2), 2)
    drawn, errors = outcome(
        engine,
        Sequence("a", PROMPT, 9, Sampling(grammar=grammar), frozenset({8})),
        Sequence("b", PROMPT, 9, Sampling(grammar=grammar)),
    )
    assert drawn == {"a": [5, 6, 8], "b": [5, 6, 8, 8, 8, 8, 8, 8, 8]}
    assert not errors


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("fault", ["start", "fill", "accept", "empty"])
def test_a_fault_of_one_matcher_ends_its_sequence_alone(fault, at, chain):
    jobs = [
        Sequence("faulty", PROMPT, 12, Sampling(seed=1, grammar=FaultyGrammar(BROKEN, fault=fault, at=at))),
        Sequence("masked", PROMPT, 12, Sampling(seed=2, grammar=DigestGrammar(BROKEN, 9))),
        Sequence("free", PROMPT, 12, Sampling(seed=3)),
    ]
    one, several = chain(), chain(3)
    alone = {each.id: outcome(engine_over(one), replace(each)) for each in jobs}
    engine = engine_over(several, 3)
    drawn, errors = outcome(engine, *jobs)
    for name, (drawn_alone, errors_alone) in alone.items():
        assert drawn[name] == drawn_alone[name]
        assert (name in errors) == bool(errors_alone) == (name == "faulty")
    index = 0 if fault == "start" else at
    assert f"index {index} of the answer" in errors["faulty"].message
    assert errors["faulty"].code == "INVALID_REQUEST"
    assert len(drawn["faulty"]) == index + (fault == "accept")
    assert engine.kv_blocks["used"] == 0
    again = Sequence("again", PROMPT, 12, Sampling(seed=2, grammar=DigestGrammar(BROKEN, 9)))
    assert outcome(engine, again)[0]["again"] == drawn["masked"], "the slot of the failed sequence is as before"


@pytest.mark.parametrize("followed", [False, True])
def test_a_fault_at_a_first_token_ends_its_sequence_alone_also_if_that_is_aborted(followed, chain):
    engine = engine_over(chain(2), 2)
    beside = Sequence("beside", PROMPT, 20)
    faulty = Sampling(grammar=FaultyGrammar(BROKEN, fault="accept", at=0))
    engine.add(beside)
    engine.step()
    engine.step()
    for abort in (True, False):
        engine.add(Sequence("faulty", PROMPT, 9, faulty, replay=[5, 5, 5]))
        engine.step()
        found = engine.first_tokens()
        assert {token.sequence_id for token in found} == {"faulty"}
        assert isinstance(found[-1], FailedSequence)
        if abort:
            engine.abort("faulty")
        if followed:
            engine.add(Sequence("next", PROMPT, 3))
        drawn = [token for _ in range(4) for token in engine.step()]
        assert {token.sequence_id for token in drawn} == {"beside", *(["next"] if followed else [])}
        assert not any(isinstance(token, FailedSequence) for token in drawn)


def test_replayed_ids_that_the_grammar_refuses_end_the_sequence(chain):
    sampling = Sampling(grammar=ListGrammar(((5,), (6,)), VOCABULARY))
    drawn, errors = outcome(engine_over(chain()), Sequence("a", PROMPT, 9, sampling, replay=[5, 7, 6, 6]))
    assert drawn["a"] == [5, 7]
    assert errors["a"].message == "response_format: id 7 is not allowed (at index 1 of the answer)"


def test_logits_that_are_not_finite_are_no_fault_of_the_grammar(chain):
    sampling = Sampling(grammar=ListGrammar(((5, BROKEN),), VOCABULARY))
    _, errors = outcome(engine_over(chain()), Sequence("a", [BROKEN], 4, sampling))
    assert errors["a"].code == "INTERNAL"


@pytest.mark.parametrize("running", [2, 3])
def test_sequences_without_a_grammar_speculate_beside_one_that_has_one(running, chain):
    def draws(speculation):
        runner = chain(running, drafts=speculation != "off")
        if speculation != "off":
            runner.drafts = DraftSupport(1, dict.fromkeys((1, 2, 4, 8), 1.0), 0.0)
        engine = engine_over(runner, running, speculation=speculation)
        return run_jobs(engine, jobs).draws, engine

    jobs = [replace(job, prompt=job.prompt[:9] * 4, max_tokens=40) for job in jobs_with_grammars(8, 1, BROKEN)]
    jobs = [job if job.sampling.grammar else replace(job, sampling=Sampling(temperature=0)) for job in jobs]
    expected, _ = draws("off")
    drawn, engine = draws("ngram")
    assert drawn == expected
    assert engine.draft_tokens[0] > 5


@pytest.mark.parametrize("running", [1, 3])
def test_a_vocabulary_that_is_no_multiple_of_a_word_is_masked_to_its_last_id(running, chain):
    size = 100
    last = size - 1
    grammar = ListGrammar(((last, BROKEN), (last,), (0, last - 1)), size)
    sequences = [Sequence(str(n), PROMPT, 6, Sampling(seed=n, grammar=grammar)) for n in range(running)]
    drawn, _ = outcome(engine_over(chain(running, vocabulary=size), running), *sequences)
    assert all(of[:2] == [last, last] and set(of[2:]) <= {0, last - 1} for of in drawn.values())
