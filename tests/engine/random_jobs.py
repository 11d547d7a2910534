"""Random jobs for comparisons of an engine that runs many at once with each job run alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

from worker.engine import FailedSequence, Sequence
from worker.sampling import Sampling


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


def random_jobs(count, seed, vocab_size, prompt=48, tokens=10):
    """Jobs with prompts and answers of up to that many tokens.

    A third begin with a common prefix, and a tenth have answers of up to four times the tokens.
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
        jobs.append(RandomJob(str(number), ids, length, _sampling(chance, vocab_size), ends, abort_after))
    return jobs


def draws_alone(make_engine, job):
    """The draws of a job that runs alone, up to its abort."""
    return run_jobs(make_engine(), [job])[job.name]


def run_jobs(engine, jobs, chance=None):
    """The draws of each job: all are added at once, or a random number of them before each step."""
    left, drawn = list(jobs), {job.name: [] for job in jobs}
    aborts = {job.name: job.abort_after for job in jobs}
    while left or not engine.idle:
        for _ in range(chance.choice([0, 1, 1, 2, 5, 90]) if chance else len(left)):
            if left:
                engine.add(left.pop().sequence())
        for token in engine.step():
            assert not isinstance(token, FailedSequence)
            drawn[token.sequence_id].append(token.draw)
            if len(drawn[token.sequence_id]) == aborts[token.sequence_id]:
                engine.abort(token.sequence_id)
    return drawn


def _sampling(chance, vocab_size):
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
    )
