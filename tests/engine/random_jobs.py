"""Random jobs for comparisons of an engine that runs many at once with each job run alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.grammars import DigestGrammar
from tests.models import engine_of
from worker.engine import Engine, FailedSequence, Sequence
from worker.errors import InvalidRequest
from worker.sampling import Draw, Sampling

BATCHED_MODELS = (
    "qwen2",
    "phi3",
    "gpt-oss",
    "llama3-rope",
    "mixtral",
    "qwen3",
    "qwen3moe",
    "smollm3",
    "gemma3",
    "gemma4",
    "gemma4-experts",
    "gemma4-shared",
    "granite",
    "granitemoe-shared",
    "mistral3",
)
"""Tiny models whose rows in a batch are compared with single rows on a GPU: each kind of layer."""
FULL_SIZE_TYPES = ("Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "MXFP4")
"""Types of the matrices of the full-size files."""


@dataclass(frozen=True)
class RandomJob:
    """A job's sequence, and the number of its tokens after which it is aborted, or None."""

    name: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    end_ids: frozenset[int]
    abort_after: int | None

    def sequence(self, replay=()):
        return Sequence(self.name, self.prompt, self.max_tokens, self.sampling, self.end_ids, list(replay))


def random_jobs(count, seed, vocab_size, prompt=48, tokens=10, *, grammars=True):
    """Jobs with prompts and answers of up to that many tokens.

    A third begin with a common prefix, a tenth have answers of up to four times the tokens, and a
    quarter have a grammar. Jobs without `grammars` speculate, and few of them end early.
    """
    chance = random.Random(seed)
    prefixes = [[chance.randrange(vocab_size) for _ in range(prompt)] for _ in range(3)]
    jobs = []
    for number in range(count):
        ids = [chance.randrange(vocab_size) for _ in range(chance.randint(1, prompt))]
        if chance.random() < 1 / 3:
            ids[: len(ids) * 3 // 4] = chance.choice(prefixes)[: len(ids) * 3 // 4]
        length = chance.randint(1, tokens if chance.random() < 0.9 else 4 * tokens)
        ends = frozenset(chance.sample(range(vocab_size), 3)) if chance.random() < 0.7 else frozenset()
        abort_after = chance.randint(1, length) if chance.random() < 0.1 else None
        jobs.append(RandomJob(str(number), ids, length, _sampling(chance, vocab_size, grammars), ends, abort_after))
    return jobs


def long_answers():
    """Jobs whose answers need more KV blocks than their prompts."""
    return random_jobs(40, 9, 280, prompt=16, tokens=100, grammars=False)


@dataclass
class Outcome:
    """The draws of each job by its name, and what happened to the jobs."""

    engine: Engine
    draws: dict[str, list[Draw | str]]
    """Of a job whose grammar allows no token, the error's message is the last one."""
    aborted: set[str] = field(default_factory=set)
    cached: int = 0
    """Prompt tokens that were found in the prefix cache."""
    preempted: int = 0


def draws_alone(runner, jobs, context=512):
    """The draws of each job, up to its abort, when it runs alone and finds nothing in a cache."""
    alone = {}
    for job in jobs:
        engine = engine_of(runner, context=context, prefix_cache=False)
        alone |= run_jobs(engine, [job]).draws
    return alone


def run_beside(
    runner, jobs, running, kv_blocks, *, context=512, chunks=(16, 64, 256), longest=512, preempt=0.02, **settings
):
    """The outcome of jobs of which `running` run at once, in random order, with a prefix cache.

    KV blocks are allocated in random order. The prefill budget is `longest` for 64 sequences and
    one of `chunks` for fewer. Each sequence is preempted before a step with chance `preempt`.
    `settings` are further arguments of `engine_of`.
    """
    chance = random.Random(running)
    chunk = longest if running == 64 else chance.choice(chunks)
    order = chance.sample(range(kv_blocks), kv_blocks)
    engine = engine_of(runner, context=context, running=running, chunk=chunk, beside=chunk, order=order, **settings)
    outcome = run_jobs(engine, chance.sample(jobs, len(jobs)), chance, preempt)
    assert engine.kv_blocks["used"] == 0
    assert engine.sequences[:2] == (0, 0)
    return outcome


def assert_same_draws(outcome, alone, jobs):
    """Compare ids and log-probabilities; jobs were aborted, found prefixes and were preempted."""
    for job in jobs:
        assert outcome.draws[job.name] == alone[job.name], job
    assert outcome.aborted
    assert outcome.cached
    assert outcome.preempted


def run_jobs(engine, jobs, chance=None, preempt=0.0):
    """The outcome: all jobs are added at once, or a random number of them while few wait."""
    left, outcome = list(jobs), Outcome(engine, {job.name: [] for job in jobs})
    aborts, running = {job.name: job.abort_after for job in jobs}, engine.settings.max_running
    while left or not engine.idle:
        arrivals = len(left)
        if chance:
            arrivals = chance.choice([0, 1, running, 2 * running]) if engine.sequences[1] <= running else 0
        for _ in range(min(arrivals, len(left))):
            outcome.cached += engine.add(left.pop().sequence())
        for sequence in [each for each in engine._scheduler.slots if each and preempt]:
            if chance.random() < preempt:
                engine._runner.stop(sequence.slot)
                engine._scheduler._requeue(sequence)
                outcome.preempted += 1
        for token in engine.step():
            drawn = outcome.draws[token.sequence_id]
            if isinstance(token, FailedSequence):
                assert isinstance(token.error, InvalidRequest)
                drawn.append(token.error.message)
                continue
            if token.sequence_id in outcome.aborted:
                continue  # of the step after whose first tokens it was aborted
            drawn.append(token.draw)
            if len(drawn) == aborts[token.sequence_id]:
                engine.abort(token.sequence_id)
                outcome.aborted.add(token.sequence_id)
    outcome.preempted += engine.sequences[2]
    return outcome


def _sampling(chance, vocab_size, grammars):
    def maybe(value, default):
        return value if chance.random() < 0.3 else default

    return Sampling(
        temperature=chance.choice([0, 0, 0.7, 1.0, 1.5]),
        top_k=maybe(chance.randint(1, 40), 0),
        top_p=maybe(chance.uniform(0.1, 1), 1.0),
        min_p=maybe(chance.uniform(0, 0.3), 0.0),
        repetition_penalty=maybe(chance.uniform(0.8, 1.6), 1.0),
        frequency_penalty=maybe(chance.uniform(-1, 1), 0.0),
        presence_penalty=maybe(chance.uniform(-1, 1), 0.0),
        penalize_prompt=chance.random() < 0.5,
        logit_bias=maybe({chance.randrange(vocab_size): chance.uniform(-5, 5) for _ in range(4)}, {}),
        seed=chance.getrandbits(64),
        min_tokens=maybe(chance.randint(1, 5), 0),
        ignore_eos=chance.random() < 0.2,
        stop_token_ids=maybe(frozenset(chance.sample(range(vocab_size), 2)), frozenset()),
        logprobs=maybe(chance.randint(0, 5), None),
        grammar=DigestGrammar(vocab_size, chance.getrandbits(32)) if grammars and chance.random() < 0.25 else None,
    )
