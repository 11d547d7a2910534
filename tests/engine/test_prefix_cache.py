"""Prompts with equal beginnings share KV blocks: equal bits, less computation, eviction."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.ledger_runner import LedgerRunner
from tests.models import cpu_runner, engine_of, fill_cache, ids, run
from worker.cpu.slots import HostSlots
from worker.engine import Sequence
from worker.engine.kv_blocks import ROOT, KvBlocks, PrefixIndex, split_full_blocks
from worker.errors import CudaError, InvalidRequest, VramOom
from worker.ops import Phase
from worker.sampling import Sampling

NAMES = ("qwen2", "phi3", "gpt-oss", "llama3-rope")  # gpt-oss has a sliding window
WARM = Sampling(temperature=0.8, seed=1234, top_p=0.95, repetition_penalty=1.1)
PROMPT = np.random.default_rng(3).integers(0, 280, 150).tolist()
OTHER = np.random.default_rng(4).integers(0, 280, 150).tolist()
BRANCH = PROMPT[:90] + OTHER[:9]
SHUFFLED = np.random.default_rng(5).permutation(40)


class RecordingRunner(HostSlots):
    """A CPU runner that records its batches and logits."""

    def __init__(self, runner):
        super().__init__(runner.slots, self.compute, runner._masks)
        self.vocab_size, self.kv_blocks = runner.vocab_size, runner.kv_blocks
        self.cache, self.batches, self.logits = runner.cache, [], []
        self._runner = runner

    def compute(self, batch, requests):
        self.batches.append(batch)
        self.logits += list(self._runner.logits(batch))
        return self._runner.compute(batch, requests)

    def kv(self, tokens):
        """K and V of the last batch's sequence: the bits of its first `tokens` positions."""
        table = self.batches[-1].block_tables[0]
        caches = (*self.cache.k, *self.cache.v)
        rows = [cache[table].reshape(-1, *cache.shape[2:])[:tokens].ravel() for cache in caches]
        return np.concatenate(rows).view(np.uint32)


def prefilled(batches):
    return sum(len(batch.tokens) for batch in batches if batch.phase is Phase.PREFILL)


def sequence(prompt, name="a", max_tokens=3, **kwargs):
    return Sequence(name, list(prompt), max_tokens, **kwargs)


def ledger(blocks=40, **settings):
    runner = LedgerRunner(blocks)
    return runner, engine_of(runner, **{"context": 16 * blocks, "chunk": 16, **settings})


@pytest.mark.parametrize("name", NAMES)
def test_after_a_hit_of_any_length_bits_and_tokens_equal_those_of_a_fresh_engine(name, tiny):
    inner = cpu_runner(tiny(name), kv_blocks=40)
    fresh = RecordingRunner(inner)
    expected = ids(run(engine_of(fresh, chunk=512), sequence(PROMPT, max_tokens=6, sampling=WARM))["a"])
    bits = fresh.kv(len(PROMPT) + 5)
    for blocks in range(len(PROMPT) // 16 + 1):
        fill_cache(inner)
        engine = engine_of(RecordingRunner(inner), chunk=16, order=SHUFFLED)
        run(engine, sequence(PROMPT[: 16 * blocks] + OTHER[16 * blocks :], "before"))
        engine._runner = second = RecordingRunner(inner)
        assert ids(run(engine, sequence(PROMPT, max_tokens=6, sampling=WARM))["a"]) == expected
        assert prefilled(second.batches) == len(PROMPT) - 16 * blocks
        np.testing.assert_array_equal(second.logits, fresh.logits)
        np.testing.assert_array_equal(second.kv(len(PROMPT) + 5), bits)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_continued_on_cached_blocks_has_equal_bits(name, tiny):
    inner = cpu_runner(tiny(name), kv_blocks=40)
    fresh = RecordingRunner(inner)
    whole = ids(run(engine_of(fresh), sequence(PROMPT, max_tokens=20, sampling=WARM))["a"])
    bits = fresh.kv(len(PROMPT) + 19)
    engine = engine_of(inner, order=SHUFFLED)
    run(engine, sequence(PROMPT[:100], "before"))
    engine._runner = second = RecordingRunner(inner)
    continued = run(engine, sequence(PROMPT, max_tokens=20, sampling=WARM, replay=whole[:7]))["a"]
    assert ids(continued) == whole
    assert prefilled(second.batches) == len(PROMPT) - 96
    np.testing.assert_array_equal(second.kv(len(PROMPT) + 19), bits)


@pytest.mark.parametrize("name", NAMES)
def test_two_jobs_that_read_the_same_blocks_at_once_draw_the_tokens_that_each_draws_alone(name, tiny):
    first, second = (sequence(prompt, "ab"[n], 20, sampling=WARM) for n, prompt in enumerate((PROMPT, BRANCH)))
    alone = [
        ids(run(engine_of(cpu_runner(tiny(name))), sequence(prompt, "x", 20, sampling=WARM))["x"])
        for prompt in (PROMPT, BRANCH)
    ]
    runner = RecordingRunner(cpu_runner(tiny(name), kv_blocks=40))
    engine = engine_of(runner, running=2, chunk=16, order=SHUFFLED)
    engine.add(first)
    while first.prefilled < len(first.prompt):
        engine.step()
    engine.add(second)
    while not engine.idle:
        engine.step()
    assert [first.generated, second.generated] == alone
    assert prefilled(runner.batches) == len(PROMPT) + len(BRANCH) - 80
    assert max(len(batch.block_tables) for batch in runner.batches) == 2


def test_a_second_job_with_the_same_2000_tokens_computes_only_the_rest():
    runner, engine = ledger(160, chunk=512)
    begin = np.random.default_rng(1).integers(0, 100, 2000).tolist()
    run(engine, sequence([*begin, 1, 2, 3]))
    first = runner.prefilled
    run(engine, sequence([*begin, 4, 5]))
    assert (first, runner.prefilled - first) == (2003, 2)


def test_the_last_prompt_token_is_always_computed():
    runner, engine = ledger()
    for _ in range(2):
        run(engine, sequence(range(48)))
    assert [batch.positions[0] for batch in runner.batches if batch.phase is Phase.PREFILL] == [0, 16, 32, 32]


def test_blocks_that_hold_generated_tokens_are_never_found():
    runner, engine = ledger()
    answer = ids(run(engine, sequence(range(24), max_tokens=41))["a"])
    runner.batches.clear()
    run(engine, sequence([*range(24), *answer, 7]))
    assert runner.prefilled == 24 + 41 + 1 - 16


def test_a_prompt_shares_no_block_after_the_first_difference():
    runner, engine = ledger()
    run(engine, sequence(range(64)))
    runner.batches.clear()
    run(engine, sequence([*range(16), 99, *range(17, 64)]))
    assert runner.prefilled == 48


def test_without_the_prefix_cache_nothing_is_cached():
    runner, engine = ledger(prefix_cache=False)
    for _ in range(2):
        assert engine.add(sequence(range(64)), paused=True) == 0
        resumed(engine, sequence(range(64)))
    assert runner.prefilled == 128
    assert engine.kv_blocks == {"used": 0, "cached": 0, "free": 40}


def test_a_cancelled_prefill_leaves_its_computed_blocks_cached():
    runner, engine = ledger()
    engine.add(sequence(range(64)))
    engine.step()
    engine.step()
    engine.abort("a")
    assert engine.kv_blocks == {"used": 0, "cached": 2, "free": 38}
    run(engine, sequence(range(64)))
    assert runner.prefilled == 32 + 32


@pytest.mark.parametrize("fault", [VramOom("full"), MemoryError("full")])
def test_a_failed_allocation_leaves_the_blocks_of_complete_steps_and_no_reader(fault):
    runner, engine = ledger()
    engine.add(sequence(range(64)))
    engine.step()
    runner.fault = fault
    with pytest.raises(type(fault)):
        engine.step()
    engine.abort("a")
    assert engine.kv_blocks == {"used": 0, "cached": 1, "free": 39}
    run(engine, sequence(range(64)))
    assert runner.prefilled == 16 + 48


@pytest.mark.parametrize("fault", [CudaError("lost"), RuntimeError("unknown")])
def test_a_fault_of_the_device_empties_the_cache(fault):
    runner, engine = ledger(running=2)
    run(engine, sequence(range(64), "before"))
    assert engine.add(sequence(range(64), "paused"), paused=True) == 48
    engine.add(sequence([*range(64), *range(64)]))
    engine.step()
    runner.fault = fault
    with pytest.raises(type(fault)):
        engine.step()
    finish(engine)  # the step may be repeated, but what it computes does not enter the cache
    assert engine.kv_blocks == {"used": 0, "cached": 0, "free": 40}
    runner.batches.clear()
    resumed(engine, sequence(range(64), "paused"))
    assert runner.prefilled == 64


def test_two_sequences_that_compute_equal_blocks_at_once_cache_one_copy():
    runner, engine = ledger(running=2)
    run(engine, sequence(range(32), "a", 40), sequence(range(32), "b", 40))
    assert runner.prefilled == 64
    assert engine.kv_blocks == {"used": 0, "cached": 2, "free": 38}


def test_a_paused_sequence_holds_its_prefix_until_it_runs():
    runner, engine = ledger(8)
    run(engine, sequence(range(64), "before"))
    assert engine.add(sequence(range(70)), paused=True) == 64
    assert engine.kv_blocks == {"used": 4, "cached": 0, "free": 4}
    assert engine.idle
    run(engine, sequence([9] * 40, "between", 20))
    runner.batches.clear()
    assert ids(resumed(engine, sequence(range(70)))) == [0, 1, 2]
    assert runner.prefilled == 6
    assert engine.kv_blocks["used"] == 0


def test_a_waiting_sequence_holds_its_prefix_until_it_runs():
    runner, engine = ledger(12)
    run(engine, sequence(range(64), "before"))
    engine.add(sequence([9] * 40, "first", 60))
    assert engine.add(sequence(range(70), "second")) == 64
    assert engine.kv_blocks["used"] == 4
    finish(engine)
    assert runner.prefilled == 64 + 40 + 6
    assert engine.kv_blocks["used"] == 0


def test_a_sequence_uses_no_more_cached_tokens_than_add_returned():
    runner, engine = ledger()
    assert engine.add(sequence(range(64)), paused=True) == 0
    run(engine, sequence(range(64), "before"))
    runner.batches.clear()
    resumed(engine, sequence(range(64)))
    assert runner.prefilled == 64


def test_an_abort_releases_what_a_paused_sequence_holds():
    _, engine = ledger()
    run(engine, sequence(range(64), "before"))
    for _ in range(2):
        assert engine.add(sequence(range(64)), paused=True) == 48
        assert engine.kv_blocks["used"] == 3
        engine.abort("a")
        assert engine.kv_blocks == {"used": 0, "cached": 4, "free": 36}
    assert engine.idle


def test_a_resumed_sequence_brings_its_own_replay_and_length():
    _, engine = ledger()
    engine.add(sequence(range(20)), paused=True)
    tokens = resumed(engine, sequence(range(20), max_tokens=5, replay=[0, 1]))
    assert ids(tokens) == [0, 1, 2, 3, 4]
    assert [token.replayed for token in tokens] == [True, True, False, False, False]


def test_only_a_paused_sequence_with_the_same_prompt_can_be_resumed():
    _, engine = ledger()
    engine.add(sequence(range(20)), paused=True)
    for other in (sequence(range(21)), sequence(range(20), "b")):
        with pytest.raises(ValueError, match="no paused sequence"):
            engine.resume(other)
    with pytest.raises(InvalidRequest):
        engine.resume(sequence(range(20), max_tokens=10_000))
    assert len(resumed(engine, sequence(range(20)))) == 3


def test_holds_are_given_up_when_no_sequence_could_start_otherwise():
    _, engine = ledger(4)
    run(engine, sequence(range(48), "before"))
    assert engine.add(sequence(range(48), "paused"), paused=True) == 32
    assert len(run(engine, sequence([9] * 40, "now", 20))["now"]) == 20
    resumed(engine, sequence(range(48), "paused"))
    assert engine.kv_blocks["used"] == 0


def resumed(engine, final):
    """Resume a paused sequence and run it to its end: its tokens."""
    engine.resume(final)
    return finish(engine)


def finish(engine):
    """Run every sequence to its end: all tokens."""
    tokens = []
    while not engine.idle:
        tokens += engine.step()
    return tokens


def allocate(blocks, count):
    """A table of `count` blocks without a prefix, or None."""
    return blocks.extend(np.empty(0, np.int32), count)


def cache(blocks, table, full_blocks):
    """Index the blocks of a table as those of a prompt."""
    node = ROOT
    for block, content in zip(table, full_blocks, strict=True):
        node = blocks.cache(int(block), content, node)


def find(blocks, full_blocks):
    """The cached blocks of a prompt's beginning."""
    table, _ = blocks.hold_prefix(full_blocks)
    blocks.release(table)
    return table.tolist()


def test_free_blocks_go_first_then_those_read_longest_ago_a_prompts_end_before_its_beginning():
    blocks = KvBlocks(6, np.array([4, 2, 0, 1, 3, 5], np.int32))
    prompts = {name: split_full_blocks([n] * 32) for n, name in enumerate("ab")}
    tables = {}
    for name, prompt in prompts.items():
        tables[name] = allocate(blocks, 2)
        cache(blocks, tables[name], prompt)
    assert [tables[name].tolist() for name in "ab"] == [[4, 2], [0, 1]]
    blocks.release(tables["a"])
    blocks.release(tables["b"])
    assert find(blocks, prompts["a"]) == [4, 2]  # read again, so that b was read longest ago
    assert [int(allocate(blocks, 1)[0]) for _ in range(6)] == [3, 5, 1, 0, 2, 4]
    assert find(blocks, prompts["a"]) == find(blocks, prompts["b"]) == []
    assert allocate(blocks, 1) is None


def test_a_held_prefix_does_not_count_as_free():
    blocks = KvBlocks(3)
    table = allocate(blocks, 2)
    prompt = split_full_blocks(range(32))
    cache(blocks, table, prompt)
    blocks.release(table)
    assert blocks.states == {"used": 0, "cached": 2, "free": 1}
    held, _ = blocks.hold_prefix(prompt)
    assert blocks.states == {"used": 2, "cached": 0, "free": 1}
    assert blocks.extend(held, 4) is None
    assert blocks.states == {"used": 2, "cached": 0, "free": 1}
    assert blocks.extend(held, 3).tolist() == [0, 1, 2]


@settings(max_examples=80)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=40))
def test_untouched_blocks_are_handed_out_like_a_stack_of_all_blocks(actions):
    blocks, stack, tables = KvBlocks(64), list(reversed(range(64))), []
    for release, count in actions:
        if release and tables:
            table = tables.pop(count % len(tables))
            blocks.release(table)
            stack.extend(reversed(table.tolist()))
        elif count <= len(stack):
            tables.append(allocate(blocks, count))
            assert tables[-1].tolist() == [stack.pop() for _ in range(count)]
        else:
            assert allocate(blocks, count) is None
        assert blocks.states == {"used": 64 - len(stack), "cached": 0, "free": len(stack)}


def test_a_pool_of_a_million_blocks_is_made_and_counted_at_once():
    began = time.process_time()
    for _ in range(100):
        blocks = KvBlocks(1_048_576)
        assert blocks.states == {"used": 0, "cached": 0, "free": 1_048_576}
    assert (time.process_time() - began) / 100 < 1e-3
    assert allocate(blocks, 3).tolist() == [0, 1, 2]


def test_full_blocks_are_found_by_their_ids_and_all_ids_before_them():
    assert len(split_full_blocks(range(47))) == 2
    assert split_full_blocks(range(15)) == []
    assert split_full_blocks(range(48))[:2] == split_full_blocks(range(47))
    blocks, ones = KvBlocks(4), [1] * 16
    cache(blocks, [0, 1], split_full_blocks(ones * 2))
    cache(blocks, [2, 3], split_full_blocks([2] * 16 + ones))
    assert find(blocks, split_full_blocks(ones * 3)) == [0, 1]
    assert find(blocks, split_full_blocks([2] * 16 + ones)) == [2, 3]
    assert find(blocks, split_full_blocks(ones + [2] * 16)) == [0]
    assert find(blocks, split_full_blocks([3] * 16 + ones)) == []


def test_children_of_a_removed_block_are_not_found_below_a_block_with_its_number():
    index, (one, two, three) = PrefixIndex(), split_full_blocks(range(48))
    index.insert(index.insert(ROOT, one, 7), three, 8)
    index.remove(7)
    assert index.find([one, three]) == []
    parent = index.insert(ROOT, two, 7)
    assert index.find([two, three]) == [7]
    assert index.insert(parent, three, 9) != index.node(8)
    assert index.find([two, three]) == [7, 9]


def test_nothing_is_inserted_below_a_removed_block():
    index, (one, two, three) = PrefixIndex(), split_full_blocks(range(48))
    parent = index.insert(ROOT, one, 1)
    index.remove(1)
    node = index.insert(parent, two, 2)
    index.insert(node, three, 3)
    assert 2 not in index
    assert 3 not in index
    assert index.find([one, two, three]) == []


def test_of_two_blocks_with_equal_content_the_first_is_found_and_both_have_children():
    index, (one, two) = PrefixIndex(), split_full_blocks(range(32))
    first = index.insert(ROOT, one, 1)
    assert index.insert(ROOT, one, 2) == first
    assert 2 not in index
    index.insert(first, two, 3)
    assert index.find([one, two]) == [1, 3]


def test_a_prompt_is_split_into_blocks_once(monkeypatch):
    split = []
    monkeypatch.setattr(
        "worker.engine.engine.split_full_blocks", lambda ids: split.append(len(ids)) or split_full_blocks(ids)
    )
    _, engine = ledger()
    engine.add(sequence(range(64)), paused=True)
    resumed(engine, sequence(range(64)))
    assert split == [64]
    assert engine.add(sequence(range(64), "b")) == 48
