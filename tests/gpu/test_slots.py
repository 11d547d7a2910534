"""Sequences in slots of a runner: what each gets beside others equals what it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.gpu.chain import BLOCKS, BROKEN, CONTEXT, VOCABULARY, chain_runner
from tests.gpu.loaded import gpu_runner
from tests.models import engine_of, run
from worker.engine import Sequence as EngineSequence
from worker.engine.kv_blocks import blocks_for
from worker.model import Chunk, SlotStart
from worker.sampling import Sampling

GREEDY = Sampling(temperature=0, logprobs=2)
WARM = Sampling(temperature=0.8, seed=7, top_p=0.95, repetition_penalty=1.1, logprobs=3)


@dataclass(frozen=True, eq=False)
class Job:
    """A sequence, and what ends it."""

    prompt: Sequence[int]
    tokens: int
    sampling: Sampling = GREEDY
    ends: frozenset[int] = frozenset()
    replay: Sequence[int] = ()

    def chunk(self, slot, table):
        start = SlotStart(slot, self.prompt, self.sampling, self.ends, self.tokens, self.replay)
        return Chunk(np.array(self.prompt, np.int32), 0, table, start)

    def is_over(self, draws):
        return len(draws) == self.tokens or draws[-1] is None or draws[-1].id in self.ends

    @property
    def blocks(self):
        return blocks_for(len(self.prompt) + self.tokens)


class Driver:
    """Runs jobs in a runner's slots, as an engine would: lowest free slot first, blocks reused."""

    def __init__(self, runner, order=None):
        self.runner = runner
        self.free = list(range(BLOCKS) if order is None else order)
        self.running: dict[int, tuple[Job, np.ndarray]] = {}
        self.draws: dict[int, list] = {}
        self.over: dict[Job, list] = {}

    def step(self, *jobs):
        """One call of `run` in which `jobs` join; stops what is over."""
        chunks = []
        for job in jobs:
            slot = next(slot for slot in range(self.runner.slots) if slot not in self.running)
            table = np.array([self.free.pop(0) for _ in range(job.blocks)], np.int32)
            self.running[slot], self.draws[slot] = (job, table), []
            chunks.append(job.chunk(slot, table))
        drawn = self.runner.run(chunks)
        for each in drawn:
            job, _ = self.running[each.slot]
            self.draws[each.slot].append(each.draw)
            if job.is_over(self.draws[each.slot]):
                self.over[job] = self.draws[each.slot]
                self.stop(each.slot)
        return drawn

    def stop(self, slot):
        self.runner.stop(slot)
        self.free.extend(self.running.pop(slot)[1].tolist())

    def finish(self):
        while self.running:
            self.step()
        return self.over


@pytest.fixture
def load(tiny, kernels, memory):
    """A function that loads a tiny model with slots."""
    return lambda name, slots: gpu_runner(tiny(name), kernels, memory, kv_blocks=BLOCKS, slots=slots)


@pytest.fixture
def alone(load):
    """A function that runs jobs one after another, in a runner of one slot: draws by job."""
    return lambda name, *jobs: one_by_one(Driver(load(name, 1)), jobs)


def one_by_one(driver, jobs):
    for job in jobs:
        driver.step(job)
        driver.finish()
    return driver.over


def bits(array):
    return array.get().view(np.uint16)


def jobs_of(count, seed=3, tokens=7, vocabulary=280):
    rng = np.random.default_rng(seed)
    for number in range(count):
        prompt = tuple(rng.integers(0, vocabulary, rng.integers(1, 40)).tolist())
        sampling = replace(WARM, seed=number) if number % 2 else GREEDY
        yield Job(prompt, int(rng.integers(1, tokens + 1)), sampling)


def run_shuffled(driver, jobs, rng):
    """Run jobs that join in a random order, zero to two in a step."""
    waiting = list(rng.permutation(len(jobs)))
    while waiting or driver.running:
        room = min(driver.runner.slots - len(driver.running), len(waiting), int(rng.integers(0, 3)))
        driver.step(*(jobs[waiting.pop()] for _ in range(room)))
    return driver.over


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("name", ["qwen2", "gpt-oss"])
def test_jobs_that_join_in_any_order_get_the_draws_that_they_get_alone(name, slots, load, alone):
    jobs, rng = list(jobs_of(slots + 3)), np.random.default_rng(slots)
    assert run_shuffled(Driver(load(name, slots), rng.permutation(BLOCKS)), jobs, rng) == alone(name, *jobs)


def test_a_prompt_aborted_between_its_chunks_leaves_the_prompts_beside_it_as_they_are(kernels, memory):
    def engine(slots):
        return engine_of(
            chain_runner(kernels, memory, slots, prefill_tokens=128), context=CONTEXT, chunk=128, running=slots
        )

    prompts = {"a": list(range(20)), "b": list(range(30, 62)), "aborted": [5] * 150, "after": list(range(9))}
    jobs = {name: EngineSequence(name, prompt, 6, WARM) for name, prompt in prompts.items()}
    expected = run(engine(1), *(replace(jobs[name]) for name in ("a", "b", "after")))
    together = engine(3)
    for name in ("a", "b", "aborted"):
        together.add(jobs[name])
    tokens = together.step()
    assert jobs["aborted"].prefilled == 64, "computed beside the whole prompts of a and b"
    together.abort("aborted")
    together.add(jobs["after"])
    while not together.idle:
        tokens += together.step()
    assert {name: [each for each in tokens if each.sequence_id == name] for name in expected} == expected
    assert together.kv_blocks["used"] == 0


@pytest.fixture
def chain(kernels, memory):
    """A function that makes a driver of a runner of the chain, with slots."""
    return lambda slots, **settings: Driver(chain_runner(kernels, memory, slots), **settings)


@pytest.mark.parametrize("slots", [2, 5, 9])
def test_draws_do_not_depend_on_slots_order_blocks_or_neighbours(slots, chain):
    jobs, rng = list(jobs_of(slots + 3, tokens=12, vocabulary=BROKEN)), np.random.default_rng(slots)
    expected = one_by_one(chain(1), jobs)
    assert run_shuffled(chain(slots, order=rng.permutation(BLOCKS)), jobs, rng) == expected


def test_a_padded_step_leaves_the_blocks_of_all_others_bit_equal(chain):
    driver = chain(8, order=np.random.default_rng(1).permutation(BLOCKS))
    jobs = [replace(job, tokens=9) for job in jobs_of(5, vocabulary=BROKEN)]
    cache = driver.runner.cache.array
    before = bits(cache)
    driver.step(*jobs)
    held = np.concatenate([table for _, table in driver.running.values()])
    for slot in [*driver.running][::2]:
        driver.stop(slot)
    driver.finish()
    others = np.setdiff1d(np.arange(BLOCKS), held)
    np.testing.assert_array_equal(bits(cache)[:, :, others], before[:, :, others])


def test_a_sequence_ends_on_the_device_with_an_end_id_or_its_last_token(chain):
    driver, (first, second) = chain(2), jobs_of(2, tokens=1, vocabulary=BROKEN)
    drawn = one_by_one(chain(1), [replace(first, tokens=6)])
    ids = [draw.id for draw in next(iter(drawn.values()))]
    ended = replace(first, tokens=6, ends=frozenset({ids[3], VOCABULARY + 1}))
    runner, table = driver.runner, np.arange(40, dtype=np.int32)
    runner.run([ended.chunk(0, table[:20]), replace(second, tokens=4).chunk(1, table[20:])])
    returned = [draw.slot for _ in range(8) for draw in runner.run([])]
    assert returned.count(0) == ids.index(ids[3])
    assert returned.count(1) == 3
    assert (runner._state.positions.get() == -1).all()


def test_no_step_is_launched_after_the_last_token_of_all_sequences(chain):
    driver = chain(2)
    driver.step(*(Job((1, 2), tokens) for tokens in (2, 5)))
    driver.finish()
    assert driver.runner._slots.steps == 4
    assert driver.runner.run([]) == []
    assert driver.runner._slots.steps == 4


def test_draws_of_a_stopped_slot_are_dropped_also_when_another_sequence_has_it(chain):
    jobs = list(jobs_of(3, tokens=1, vocabulary=BROKEN))
    first, second, beside = (replace(job, tokens=8) for job in jobs)
    expected = one_by_one(chain(1), [second, beside])
    driver = chain(2)
    driver.step(first, beside)
    driver.step()
    driver.stop(0)
    driver.runner.stop(0)
    driver.step(second)
    assert driver.finish() == expected


def test_logits_that_are_not_finite_stop_one_slot_only(chain):
    beside, broken = (replace(job, tokens=6) for job in jobs_of(2, vocabulary=BROKEN))
    broken = replace(broken, replay=(1, 2, BROKEN))
    driver = chain(2)
    driver.step(broken, beside)
    over = driver.finish()
    assert [draw and draw.id for draw in over[broken]] == [1, 2, BROKEN, None]
    assert over[beside] == one_by_one(chain(1), [beside])[beside]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("published", [1, 4, 9])
def test_replayed_ids_lead_to_the_draws_that_follow_them_beside_new_draws(published, slots, chain):
    whole, *others = (replace(job, tokens=10, sampling=WARM) for job in jobs_of(4, vocabulary=BROKEN))
    draws = one_by_one(chain(1), [whole, *others])
    resumed = replace(whole, replay=[draw.id for draw in draws[whole]][:published])
    driver = chain(slots)
    driver.step(*others[: slots - 1])
    driver.step(resumed)
    over = driver.finish()
    assert [draw.id for draw in over[resumed]] == [draw.id for draw in draws[whole]]
    assert over[resumed][published:] == draws[whole][published:]
    assert all(over[job] == draws[job] for job in others[: slots - 1])


@pytest.mark.parametrize("slots", [1, 3])
def test_a_block_table_may_grow_while_the_sequence_generates(slots, chain):
    job = Job(tuple(range(20)), 40, WARM)
    expected, driver = one_by_one(chain(1), [job])[job], chain(slots)
    table, draws = np.arange(BLOCKS, dtype=np.int32)[::-1], []
    draws += driver.runner.run([job.chunk(slots - 1, table[:2])])
    while len(draws) < job.tokens:
        driver.runner.extend(slots - 1, table[: blocks_for(len(job.prompt) + len(draws) + 1)])
        draws += driver.runner.run([])
    assert [draw.draw for draw in draws] == expected


def test_a_step_beyond_the_block_table_is_refused(chain):
    runner = chain(1).runner
    runner.run([Job(tuple(range(15)), 40).chunk(0, np.zeros(1, np.int32))])
    with pytest.raises(ValueError, match="block table"):
        runner.run([])


def test_a_reset_runner_computes_the_next_sequences_as_a_new_one(chain):
    jobs = [replace(job, tokens=5) for job in jobs_of(4, vocabulary=BROKEN)]
    expected, driver = one_by_one(chain(1), jobs[2:]), chain(2)
    driver.step(*jobs[:2])
    driver.runner.reset()
    driver.running.clear()
    driver.free = list(range(BLOCKS))
    assert driver.runner.run([]) == []
    driver.step(*jobs[2:])
    assert driver.finish() == expected


def test_a_step_in_which_no_sequence_joins_or_leaves_uploads_nothing(chain, monkeypatch):
    from worker.gpu.state import PinnedRing

    driver, uploads = chain(4), []
    for name in ("upload", "scatter", "upload_column"):
        method = getattr(PinnedRing, name)
        monkeypatch.setattr(PinnedRing, name, lambda *args, method=method: (uploads.append(args), method(*args))[1])
    driver.step(*(Job((1, 2, 3), 12) for _ in range(3)))
    assert uploads
    uploads.clear()
    for _ in range(8):
        assert len(driver.step()) == 3
    assert not uploads


def test_a_job_alone_in_a_runner_of_one_slot_uploads_its_prompt_and_its_slot(chain, monkeypatch):
    from worker.gpu.state import PinnedRing

    driver, uploads, method = chain(1), [], PinnedRing.upload
    monkeypatch.setattr(PinnedRing, "upload", lambda *args: (uploads.append(args), method(*args))[1])
    driver.step(Job((1, 2, 3), 12))
    driver.finish()
    assert len(uploads) == 2
