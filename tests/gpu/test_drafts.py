"""Decode steps with draft tokens return the draws of steps without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.random_jobs import random_jobs, run_jobs
from tests.gpu.chain import BLOCKS, BROKEN, chain_runner
from tests.gpu.loaded import gpu_runner
from tests.gpu.test_attention import Bench, DeviceState, Scene
from tests.gpu.test_attention_rows import SHAPES
from tests.gpu.test_slots import GREEDY, WARM, Driver, Job, jobs_of, one_by_one
from tests.models import engine_of
from worker.model import DraftSupport


class Proposing(Driver):
    """A driver that proposes, before each step, what `propose(job, index)` expects from `index` on.

    The index is the lowest one: a step in flight may have accepted draft tokens.
    """

    def __init__(self, runner, propose, *, largest=False):
        super().__init__(runner)
        self.propose, self.largest = propose, largest
        self.drafts = 0

    def step(self, *jobs):
        running = {slot: job for slot, (job, _) in self.running.items()}
        spare = self.runner.drafts.spare_rows(len(running) + len(jobs), largest=self.largest)
        for slot, job in running.items():
            index = len(self.draws[slot]) + 1
            draft = self.propose(job, index)[:spare] if index > len(job.replay) and not jobs else []
            if draft:
                self.runner.propose(slot, draft)
                self.drafts += len(draft)
                spare -= len(draft)
        return super().step(*jobs)


@pytest.fixture
def chain(kernels, memory):
    """A function that makes a runner of the chain, with slots."""
    return lambda slots, drafts=True: chain_runner(kernels, memory, slots, drafts=drafts)


def known_answers(chain, jobs):
    """The draws of jobs, and a function that proposes their ids from an index on."""
    expected = one_by_one(Driver(chain(1, False)), jobs)
    return expected, lambda job, index: [draw.id for draw in expected[job][index : index + 7] if draw]


def many(count, tokens=14):
    """Jobs of which a third are greedy, a third sampled and a third sampled with penalties."""
    samplings = (GREEDY, WARM, replace(WARM, repetition_penalty=1.0, top_p=0.8))
    jobs = jobs_of(count, tokens=1, vocabulary=BROKEN)
    return [replace(job, tokens=tokens, sampling=replace(samplings[n % 3], seed=n)) for n, job in enumerate(jobs)]


@pytest.mark.parametrize(("slots", "largest"), [(1, False), (2, False), (3, False), (5, False), (1, True), (2, True)])
def test_correct_draft_tokens_are_accepted_and_change_no_draw(slots, largest, chain):
    jobs = many(slots)
    expected, propose = known_answers(chain, jobs)
    driver = Proposing(chain(slots), propose, largest=largest)
    driver.step(*jobs)
    assert driver.finish() == expected
    assert driver.drafts
    if slots == 1:  # of two steps in a row, the second one's draft tokens are off by those of the first
        assert driver.runner._slots.steps <= 8


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("slots", [1, 2])
def test_wrong_draft_tokens_change_no_draw(slots, wrong, chain):
    def propose(job, index):
        ids = right(job, index)
        return [*ids[:wrong], *((token + 1) % BROKEN for token in ids[wrong:])]

    jobs = many(slots)
    expected, right = known_answers(chain, jobs)
    driver = Proposing(chain(slots), propose)
    driver.step(*jobs)
    assert driver.finish() == expected
    assert driver.drafts > 10


def test_end_ids_limits_and_replays_are_those_of_single_steps(chain):
    first, second = many(2)
    expected, _ = known_answers(chain, [first, second])
    ids = {job: [draw.id for draw in draws] for job, draws in expected.items()}
    ended = replace(first, ends=frozenset({ids[first][8]}))
    ended_late = replace(first, ends=frozenset({*range(200, 217), ids[first][8]}))  # more than the device knows
    resumed = replace(second, replay=ids[second][:5])
    jobs = [ended, ended_late, resumed]
    expected, propose = known_answers(chain, jobs)
    for job in jobs:
        driver = Proposing(chain(1), propose)
        driver.step(job)
        assert driver.finish() == {job: expected[job]}
        assert driver.runner.run([]) == []


def test_logits_that_are_not_finite_count_only_after_accepted_draft_tokens(chain):
    job = replace(next(jobs_of(1, vocabulary=BROKEN)), tokens=9)
    expected, right = known_answers(chain, [job])
    driver = Proposing(chain(1), lambda job, index: [BROKEN, *right(job, index)])
    driver.step(job)
    assert driver.finish() == expected
    broken = replace(job, replay=(1, 2, BROKEN))
    driver = Proposing(chain(1), lambda job, index: [7, 7, 7])
    driver.step(broken)
    assert driver.finish()[broken][-1] is None


def test_steps_with_draft_tokens_write_only_the_blocks_of_their_sequence(chain):
    job = replace(many(1)[0], tokens=20)
    _, propose = known_answers(chain, [job])
    driver = Proposing(chain(1), propose)
    cache = driver.runner.cache.array
    before = cache.get().view(np.uint16)
    driver.step(job)
    held = driver.running[0][1]
    driver.finish()
    others = np.setdiff1d(np.arange(BLOCKS), held)
    np.testing.assert_array_equal(cache.get().view(np.uint16)[:, :, others], before[:, :, others])


def test_draft_tokens_beyond_the_block_table_are_refused(chain):
    runner = chain(1)
    runner.run([Job(tuple(range(13)), 40).chunk(0, np.zeros(1, np.int32))])
    runner.propose(0, [1, 2, 3])
    with pytest.raises(ValueError, match="block table"):
        runner.run([])


def test_draft_tokens_of_a_replayed_slot_are_refused(chain):
    runner = chain(1)
    runner.run([Job((1, 2, 3), 40, replay=(4, 5, 6, 7)).chunk(0, np.arange(4, dtype=np.int32))])
    with pytest.raises(ValueError, match="replayed"):
        runner.propose(0, [6])


@pytest.mark.parametrize("newest", [3, 17, 130, 259])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[9], SHAPES[11], SHAPES[14]], ids=str)
def test_rows_of_one_sequence_have_the_bits_of_steps_one_after_another(kernels, memory, shape, newest):
    scene = Scene(shape, newest + 1)
    positions = list(range(newest - 3, newest + 1))
    single, together = Bench(scene, kernels, memory, slots=1), Bench(scene, kernels, memory, slots=4)
    for bench in (single, together):
        bench.fill(positions[0])
    alone = [single.decode([position]).copy()[0] for position in positions]
    rows = np.array([2, 0, 3, 1], np.int32)
    at = np.array([positions[int(np.flatnonzero(rows == slot)[0])] for slot in range(4)], np.int32)
    k, v = (together.pool.put(x[positions]) for x in (scene.k, scene.v))
    tables = together.pool.put(np.tile(scene.table, (4, 1)))
    state = DeviceState(together.pool.put(rows), together.pool.put(at), tables)
    together.decode_attention.write_rows(kernels, k, v, together.spec, state)
    np.testing.assert_array_equal(together.decode(at, rows), alone)
    np.testing.assert_array_equal(together.cache.array.get().view(np.uint16), single.cache.array.get().view(np.uint16))
    before = together.cache.array.get().view(np.uint16)
    inactive = DeviceState(together.pool.put(np.array([-1, 0, 1, 2], np.int32)), together.pool.put(at * 0 - 1), tables)
    together.decode_attention.write_rows(kernels, k, v, together.spec, inactive)
    np.testing.assert_array_equal(together.cache.array.get().view(np.uint16), before)
    together.pool.check()


@pytest.mark.parametrize("running", [1, 3])
@pytest.mark.parametrize(
    "name",
    ["qwen2", "phi3", "gpt-oss", "llama3-rope", "qwen3moe", "gemma3", "gemma4", "gemma4-experts", "gemma4-shared"],
)
def test_random_jobs_draw_the_same_bits_with_prompt_lookup(name, running, tiny, kernels, memory):
    def draws(speculation):
        runner = gpu_runner(tiny(name), kernels, memory, kv_blocks=60, slots=running, drafts=speculation != "off")
        if speculation != "off":
            runner.drafts = DraftSupport(1, dict.fromkeys((1, 2, 4, 8), 1.0), 0.0)
        engine = engine_of(runner, running=running, speculation=speculation)
        return run_jobs(engine, jobs).draws, engine

    jobs = random_jobs(16, 7, 280, tokens=40, grammars=False)
    jobs = [replace(job, prompt=job.prompt[:9] * 4) for job in jobs]
    expected, _ = draws("off")
    drawn, engine = draws("ngram")
    assert drawn == expected
    assert engine.draft_tokens[0] > 5
