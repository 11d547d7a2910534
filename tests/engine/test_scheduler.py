"""Chunk sizes, the order of starts, the prefill budget, slots and preemption."""

from __future__ import annotations

import pytest

from tests.engine.ledger_runner import LedgerRunner, LookaheadRunner, alone
from tests.models import engine_of, run
from worker.echo import EchoRunner
from worker.engine import FailedSequence, Sequence
from worker.engine.scheduler import chunk_after
from worker.engine.waiting import AGING_STEPS
from worker.ops import KV_BLOCK


@pytest.mark.parametrize(
    ("prefilled", "chunk", "expected"),
    [
        *((0, 4096, 4096), (16, 4096, 2048), (11_264, 4096, 2048), (11_280, 4096, 1024), (32_256, 4096, 1024)),
        *((32_272, 4096, 512), (73_472, 4096, 512), (73_488, 4096, 256), (200_000, 4096, 128)),
        *((0, 1024, 1024), (32_256, 1024, 1024), (32_272, 1024, 512)),
    ],
)
def test_a_chunk_halves_where_attention_would_make_it_longer(prefilled, chunk, expected):
    assert chunk_after(prefilled, chunk) == expected


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_small_chunks_stay_as_they_are(chunk):
    assert chunk_after(1_000_000, chunk) == chunk


@pytest.mark.parametrize("chunk", [16 * n for n in range(1, 257)])
def test_a_chunk_is_always_a_number_of_full_blocks(chunk):
    sizes = [chunk_after(prefilled, chunk) for prefilled in (0, 40_000, 70_000, 140_000, 10**6)]
    assert all(size > 0 and size % KV_BLOCK == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)


def sequence(name, prompt=16, tokens=4, priority=0, tenant=""):
    return Sequence(name, [1] * prompt, tokens, priority=priority, tenant=tenant)


def first_tokens(engine, *sequences):
    """The sequences in the order of their first tokens."""
    for each in sequences:
        engine.add(each)
    order = []
    while not engine.idle:
        order += [token.sequence_id for token in engine.step() if token.index == 0]
    return "".join(order)


def test_the_lowest_priority_number_starts_first_and_equal_ones_in_order():
    engine = engine_of(EchoRunner(100, 64))
    jobs = [sequence("a", priority=5), sequence("b"), sequence("c", priority=9), sequence("d", priority=5)]
    assert first_tokens(engine, *jobs) == "badc"


def test_tenants_of_equal_priority_take_turns():
    engine = engine_of(EchoRunner(100, 64))
    jobs = [sequence(name, tenant="x") for name in "abc"] + [sequence("d", tenant="y"), sequence("e", tenant="y")]
    assert first_tokens(engine, *jobs, sequence("f", priority=1)) == "adbecf"


def test_a_sequence_that_waits_long_becomes_more_urgent():
    engine = engine_of(EchoRunner(100, 64))
    engine.add(sequence("patient", priority=2))
    started, steps = [], 0
    while "patient" not in started:
        if engine.sequences[1] < 2:
            engine.add(sequence(str(steps)))
        started += [token.sequence_id for token in engine.step() if token.index == 0]
        steps += 1
    assert 2 * AGING_STEPS <= steps <= 2 * AGING_STEPS + 8


class ChunkRecorder(EchoRunner):
    """An echo that records the tokens of each step's chunks and the slots that drew."""

    def __init__(self, slots=8):
        super().__init__(100, 4096, slots=slots)
        self.chunks, self.drawn = [], []

    def run(self, chunks, on_launched):
        self.chunks.append([(int(chunk.start), len(chunk.tokens)) for chunk in chunks])
        draws = super().run(chunks, on_launched)
        self.drawn.append([draw.slot for draw in draws])
        return draws


def test_a_prompt_is_computed_in_small_chunks_while_another_sequence_generates_in_every_step():
    runner = ChunkRecorder()
    engine = engine_of(runner, context=4096, chunk=1024, running=2, beside=128, prefix_cache=False)
    engine.add(sequence("a", tokens=100))
    engine.step()
    engine.add(sequence("b", 1500))
    for _ in range(12):
        engine.step()
    assert runner.chunks[1:] == [[(start, min(128, 1500 - start))] for start in range(0, 1500, 128)]
    assert all(0 in slots for slots in runner.drawn)


def test_a_step_of_several_deep_prompts_takes_no_longer_than_one_of_a_prompt():
    """Six prompts share 16,384 cached tokens; by tokens alone, four of them would fit a step."""
    runner, prefix = ChunkRecorder(), [1] * 16_384
    engine = engine_of(runner, context=32_768, chunk=4096, running=8)
    run(engine, Sequence("first", [*prefix, 2], 1))
    runner.chunks.clear()
    run(engine, *(Sequence(str(n), [*prefix, *[n] * 1000], 1) for n in range(6)))
    work = [sum(tokens * (8192 + start + tokens // 2) for start, tokens in step) for step in runner.chunks]
    assert sum(tokens for step in runner.chunks for _, tokens in step) == 6000
    assert max(work) <= 4096 * (8192 + 2048) < 2 * max(work)
    assert max(map(len, runner.chunks)) > 1


def test_more_prompt_tokens_are_computed_beside_many_generating_sequences():
    runner = ChunkRecorder(slots=128)
    engine = engine_of(runner, context=4096, chunk=8192, running=128, beside=128, prefix_cache=False)
    for number in range(100):
        engine.add(sequence(str(number), tokens=500))
    engine.step()
    engine.add(sequence("long", 2000))
    engine.step()
    assert runner.chunks == [[(0, 16)] * 100, [(0, 192)]]


def test_prompts_take_turns_so_that_a_short_one_does_not_wait_for_a_long_one():
    runner = ChunkRecorder()
    engine = engine_of(runner, context=4096, chunk=256, running=4)
    jobs = [sequence("long", 2000), sequence("longer", 3000), sequence("short", 100)]
    assert first_tokens(engine, *jobs) == "shortlonglonger"
    assert [len(each) for each in runner.chunks[:3]] == [1, 1, 2]


def test_without_generating_sequences_a_step_has_chunks_of_several_prompts():
    runner = ChunkRecorder()
    engine = engine_of(runner, context=4096, chunk=1024, running=8)
    first_tokens(engine, *(sequence(str(n), 200) for n in range(8)))
    assert runner.chunks[0] == [(0, 200)] * 4 + [(0, 192)]


def test_the_end_of_a_prompt_is_not_followed_by_a_small_chunk_of_another_prompt():
    runner = ChunkRecorder()
    engine = engine_of(runner, context=4096, chunk=1024, running=4, beside=128, prefix_cache=False)
    engine.add(sequence("a", tokens=100))
    engine.step()
    for number in range(3):
        engine.add(sequence(f"long {number}", 208))
    for _ in range(6):
        engine.step()
    assert runner.chunks[1:] == [[(0, 128)]] * 3 + [[(128, 80)]] * 3


def test_a_chunk_costs_whole_kv_blocks_of_the_budget():
    runner = ChunkRecorder()
    first_tokens(engine_of(runner, chunk=64, running=8), *(sequence(str(n), 1 + n // 7 * 16) for n in range(8)))
    assert [len(each) for each in runner.chunks[:3]] == [4, 3, 1]


def test_a_prompt_that_could_only_begin_leaves_the_rest_of_the_budget_to_a_shorter_one():
    runner = ChunkRecorder()
    engine = engine_of(runner, chunk=256, running=3, prefix_cache=False)
    first_tokens(engine, sequence("first", 200), sequence("long", 100), sequence("short", 30))
    assert runner.chunks[:2] == [[(0, 200), (0, 30)], [(0, 100)]]


def test_slots_are_handed_out_lowest_first_and_reused():
    runner = ChunkRecorder()
    engine = engine_of(runner, chunk=1024, running=3)
    for name, tokens in (("a", 9), ("b", 2), ("c", 9)):
        engine.add(sequence(name, tokens=tokens))
    engine.step()
    engine.step()
    engine.add(sequence("d", tokens=9))
    engine.step()
    assert runner.drawn == [[0, 1, 2], [0, 1, 2], [0, 2, 1]]


def test_a_sequence_without_finite_logits_ends_alone():
    runner = LedgerRunner(64)
    runner.unfit = 7
    engine = engine_of(runner, running=2, chunk=256)
    engine.add(Sequence("a", [1, 2, 3], 5))
    engine.add(Sequence("b", [7, 8], 5))
    tokens = []
    while not engine.idle:
        tokens += engine.step()
    assert [token.sequence_id for token in tokens if isinstance(token, FailedSequence)] == ["b"]
    assert [token.draw.id for token in tokens if token.sequence_id == "a"] == [1, 2, 3, 1, 2]
    assert engine.kv_blocks["used"] == 0


def test_the_youngest_sequence_of_the_least_urgent_priority_is_preempted_and_starts_first_again():
    runner = LookaheadRunner(16)
    engine = engine_of(runner, running=3, chunk=256, prefix_cache=False)
    jobs = [Sequence(name, [n + 1] * 16, 120, priority=n // 2) for n, name in enumerate("abc")]
    for job in jobs:
        engine.add(job)
    preempted = []
    while not engine.idle:
        engine.step()
        running, waiting, _ = engine.sequences
        if waiting and running == 2:
            preempted.append([job.id for job in jobs if job.preempted])
    assert preempted
    assert all(each == ["c"] for each in preempted)
    assert [job.generated for job in jobs] == [alone(job.prompt, 120) for job in jobs]


def test_one_sequence_at_a_time_owns_all_its_blocks_from_the_start():
    engine = engine_of(EchoRunner(100, 64))
    engine.add(sequence("a", 16, 200))
    engine.step()
    assert engine.kv_blocks["used"] == 14


def test_an_engine_has_no_more_running_sequences_than_its_runner_has_slots():
    with pytest.raises(ValueError, match="above the runner's 2 slots"):
        engine_of(EchoRunner(100, 64, slots=2), running=3)
