"""Prompts that begin alike share KV blocks: what is computed again, which bits come out, what is kept and what goes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.ledger import LedgerRunner
from tests.models import cpu_runner, engine_of, ids, run
from worker.engine import Sequence
from worker.engine.kv_blocks import KvBlocks
from worker.engine.prefix_index import ROOT, PrefixIndex, whole_blocks
from worker.errors import CudaError, VramOom
from worker.ops import Phase
from worker.sampling import Sampling

NAMES = ("qwen2", "phi3", "gpt-oss", "llama3-rope")  # gpt-oss has a sliding window
WARM = Sampling(temperature=0.8, seed=1234, top_p=0.95, repetition_penalty=1.1)
PROMPT = np.random.default_rng(3).integers(0, 280, 150).tolist()
OTHER = np.random.default_rng(4).integers(0, 280, 150).tolist()
BRANCH = PROMPT[:90] + OTHER[:9]
SHUFFLED = np.random.default_rng(5).permutation(40)


class Observed:
    """A CPU runner that keeps its batches and logits."""

    def __init__(self, runner):
        self.vocab_size, self.kv_blocks = runner.vocab_size, runner.kv_blocks
        self.cache, self.batches, self.logits = runner.cache, [], []
        self._runner = runner

    def run(self, batch, requests, on_launched):
        self.batches.append(batch)
        self.logits += list(self._runner.logits(batch))
        return self._runner.run(batch, requests, on_launched)

    def kv(self, tokens):
        """K and V of the last batch's sequence: the bits of its first `tokens` positions."""
        table = self.batches[-1].block_tables[0]
        k, v = (c[:, table].reshape(len(c), -1, *c.shape[3:])[:, :tokens] for c in (self.cache.k, self.cache.v))
        return np.stack([k, v]).view(np.uint32)


def prefilled(batches):
    return sum(len(batch.tokens) for batch in batches if batch.phase is Phase.PREFILL)


def sequence(prompt, name="a", max_tokens=3, **kwargs):
    return Sequence(name, list(prompt), max_tokens, **kwargs)


def ledger(blocks=40, **settings):
    runner = LedgerRunner(blocks)
    return runner, engine_of(runner, **{"context": 16 * blocks, "chunk": 16, **settings})


@pytest.mark.parametrize("name", NAMES)
def test_after_hits_of_every_block_count_bits_and_tokens_are_those_of_a_fresh_engine(name, tiny):
    inner = cpu_runner(tiny(name), kv_blocks=40)
    fresh = Observed(inner)
    expected = ids(run(engine_of(fresh, chunk=512), sequence(PROMPT, max_tokens=6, sampling=WARM))["a"])
    bits = fresh.kv(len(PROMPT) + 5)
    for blocks in range(len(PROMPT) // 16 + 1):
        inner.cache.k[:], inner.cache.v[:] = np.nan, np.nan
        engine = engine_of(Observed(inner), chunk=16, order=SHUFFLED)
        run(engine, sequence(PROMPT[: 16 * blocks] + OTHER[16 * blocks :], "before"))
        engine._runner = second = Observed(inner)
        assert ids(run(engine, sequence(PROMPT, max_tokens=6, sampling=WARM))["a"]) == expected
        assert prefilled(second.batches) == len(PROMPT) - 16 * blocks
        np.testing.assert_array_equal(second.logits, fresh.logits)
        np.testing.assert_array_equal(second.kv(len(PROMPT) + 5), bits)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_continued_on_cached_blocks_goes_on_bit_for_bit(name, tiny):
    inner = cpu_runner(tiny(name), kv_blocks=40)
    fresh = Observed(inner)
    whole = ids(run(engine_of(fresh), sequence(PROMPT, max_tokens=20, sampling=WARM))["a"])
    bits = fresh.kv(len(PROMPT) + 19)
    engine = engine_of(inner, order=SHUFFLED)
    run(engine, sequence(PROMPT[:100], "before"))
    engine._runner = second = Observed(inner)
    continued = run(engine, sequence(PROMPT, max_tokens=20, sampling=WARM, replay=whole[:7]))["a"]
    assert ids(continued) == whole
    assert prefilled(second.batches) == len(PROMPT) - 96
    np.testing.assert_array_equal(second.kv(len(PROMPT) + 19), bits)


@pytest.mark.parametrize("name", NAMES)
def test_two_jobs_that_read_the_same_blocks_at_once_draw_what_each_draws_alone(name, tiny):
    first, second = (sequence(prompt, "ab"[n], 20, sampling=WARM) for n, prompt in enumerate((PROMPT, BRANCH)))
    alone = [
        ids(run(engine_of(cpu_runner(tiny(name))), sequence(prompt, "x", 20, sampling=WARM))["x"])
        for prompt in (PROMPT, BRANCH)
    ]
    runner = Observed(cpu_runner(tiny(name), kv_blocks=40))
    engine = engine_of(runner, running=2, chunk=16, order=SHUFFLED)
    engine.add(first)
    while first.in_prefill:
        engine.step()
    engine.add(second)
    while not engine.idle:
        engine.step()
    assert [first.generated, second.generated] == alone
    assert prefilled(runner.batches) == len(PROMPT) + len(BRANCH) - 80
    assert max(len(batch.block_tables) for batch in runner.batches) == 2


def test_a_second_job_with_the_same_2000_tokens_computes_only_its_own():
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


def test_a_prompt_that_differs_early_shares_nothing_after():
    runner, engine = ledger()
    run(engine, sequence(range(64)))
    runner.batches.clear()
    run(engine, sequence([*range(16), 99, *range(17, 64)]))
    assert runner.prefilled == 48


def test_switched_off_nothing_is_kept():
    runner, engine = ledger(prefix_cache=False)
    for _ in range(2):
        assert engine.reserve("a", list(range(64))) == 0
        run(engine, sequence(range(64)))
    assert runner.prefilled == 128
    assert engine.kv_blocks == {"used": 0, "cached": 0, "free": 40}


def test_a_cancelled_prefill_leaves_the_blocks_that_it_had_computed():
    runner, engine = ledger()
    engine.add(sequence(range(64)))
    engine.step()
    engine.step()
    engine.abort("a")
    assert engine.kv_blocks == {"used": 0, "cached": 2, "free": 38}
    run(engine, sequence(range(64)))
    assert runner.prefilled == 32 + 32


@pytest.mark.parametrize("fault", [VramOom("full"), MemoryError("full")])
def test_a_failed_allocation_leaves_the_blocks_of_whole_steps_and_no_reader(fault):
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


@pytest.mark.parametrize("fault", [CudaError("lost"), RuntimeError("who knows")])
def test_a_fault_that_leaves_doubt_empties_the_cache(fault):
    runner, engine = ledger(running=2)
    run(engine, sequence(range(64), "before"))
    assert engine.reserve("c", list(range(64))) == 48
    engine.add(sequence([*range(64), *range(64)]))
    engine.step()
    runner.fault = fault
    with pytest.raises(type(fault)):
        engine.step()
    while not engine.idle:  # it may be repeated, but nothing that it computes is trusted to others
        engine.step()
    assert engine.kv_blocks == {"used": 0, "cached": 0, "free": 40}
    runner.batches.clear()
    run(engine, sequence(range(64)))
    assert runner.prefilled == 64


def test_two_that_compute_the_same_at_once_keep_one_copy():
    runner, engine = ledger(running=2)
    run(engine, sequence(range(32), "a", 40), sequence(range(32), "b", 40))
    assert runner.prefilled == 64
    assert engine.kv_blocks == {"used": 0, "cached": 2, "free": 38}


def test_a_reservation_is_what_the_sequence_then_uses():
    runner, engine = ledger(8)
    run(engine, sequence(range(64), "before"))
    assert engine.reserve("a", list(range(70))) == 64
    assert engine.kv_blocks == {"used": 4, "cached": 0, "free": 4}
    run(engine, sequence([9] * 40, "between", 20))
    runner.batches.clear()
    run(engine, sequence(range(70)))
    assert runner.prefilled == 6
    assert engine.kv_blocks["used"] == 0


def test_no_more_is_used_than_was_reserved():
    runner, engine = ledger()
    assert engine.reserve("a", list(range(64))) == 0
    run(engine, sequence(range(64), "before"))
    runner.batches.clear()
    run(engine, sequence(range(64)))
    assert runner.prefilled == 64


def test_what_is_reserved_is_given_up_by_an_abort_or_a_second_reservation():
    _, engine = ledger()
    run(engine, sequence(range(64), "before"))
    for _ in range(2):
        assert engine.reserve("a", list(range(64))) == 48
        assert engine.kv_blocks["used"] == 3
    engine.abort("a")
    assert engine.kv_blocks == {"used": 0, "cached": 4, "free": 36}
    assert engine.idle


def test_a_reservation_for_another_prompt_shows_it_nothing_wrong():
    runner, engine = ledger()
    run(engine, sequence(range(64), "before"))
    engine.reserve("a", list(range(64)))
    runner.batches.clear()
    run(engine, sequence([5] * 64))
    assert runner.prefilled == 64


def test_reservations_give_way_to_one_that_could_never_start_otherwise():
    _, engine = ledger(4)
    run(engine, sequence(range(48), "before"))
    assert engine.reserve("later", list(range(48))) == 32
    assert len(run(engine, sequence([9] * 40, "now", 20))["now"]) == 20
    run(engine, sequence(range(48), "later"))
    assert engine.kv_blocks["used"] == 0


def keep(blocks, table, prompt):
    """Let the blocks of a table be found as those of a prompt."""
    place = ROOT
    for block, content in zip(table, prompt, strict=True):
        place = blocks.keep(int(block), content, place)


def test_free_blocks_go_first_then_those_read_longest_ago_a_prompts_end_before_its_beginning():
    blocks = KvBlocks(6, np.array([4, 2, 0, 1, 3, 5], np.int32))
    prompts = {name: whole_blocks([n] * 32) for n, name in enumerate("ab")}
    tables = {}
    for name, prompt in prompts.items():
        tables[name] = blocks.take(2)
        keep(blocks, tables[name], prompt)
    assert [tables[name].tolist() for name in "ab"] == [[4, 2], [0, 1]]
    blocks.give_back(tables["a"])
    blocks.give_back(tables["b"])
    blocks.give_back(blocks.take(2, blocks.find(prompts["a"])))  # read again: b is the older one now
    taken = [int(blocks.take(1)[0]) for _ in range(6)]
    assert taken == [3, 5, 1, 0, 2, 4]
    assert blocks.find(prompts["a"]) == blocks.find(prompts["b"]) == []
    assert blocks.take(1) is None


def test_a_prefix_that_nobody_reads_is_not_counted_as_room():
    blocks = KvBlocks(3)
    table = blocks.take(2)
    prompt = whole_blocks(range(32))
    keep(blocks, table, prompt)
    blocks.give_back(table)
    before = blocks.states
    assert blocks.take(4, blocks.find(prompt)) is None
    assert blocks.states == before == {"used": 0, "cached": 2, "free": 1}
    assert blocks.take(3, blocks.find(prompt)).tolist() == [*table.tolist(), 2]


def test_blocks_are_found_by_their_ids_and_all_before_them_and_only_whole_ones():
    assert len(whole_blocks(range(47))) == 2
    assert whole_blocks(range(15)) == []
    assert whole_blocks(range(48))[:2] == whole_blocks(range(47))
    blocks, ones = KvBlocks(4), [1] * 16
    keep(blocks, [0, 1], whole_blocks(ones * 2))
    keep(blocks, [2, 3], whole_blocks([2] * 16 + ones))
    assert blocks.find(whole_blocks(ones * 3)) == [0, 1]
    assert blocks.find(whole_blocks([2] * 16 + ones)) == [2, 3]
    assert blocks.find(whole_blocks(ones + [2] * 16)) == [0]
    assert blocks.find(whole_blocks([3] * 16 + ones)) == []


def test_what_followed_a_dropped_block_is_not_found_behind_another_that_takes_its_number():
    index, (one, two, three) = PrefixIndex(), whole_blocks(range(48))
    index.enter(index.enter(ROOT, one, 7), three, 8)
    index.drop(7)
    assert index.find([one, three]) == []
    parent = index.enter(ROOT, two, 7)
    assert index.find([two, three]) == [7]
    assert index.enter(parent, three, 9) != index.place(8)
    assert index.find([two, three]) == [7, 9]


def test_nothing_is_entered_behind_a_dropped_block():
    index, (one, two, three) = PrefixIndex(), whole_blocks(range(48))
    parent = index.enter(ROOT, one, 1)
    index.drop(1)
    place = index.enter(parent, two, 2)
    index.enter(place, three, 3)
    assert 2 not in index
    assert 3 not in index
    assert index.find([one, two, three]) == []


def test_a_block_that_holds_what_another_does_is_not_found_but_what_follows_it_is():
    index, (one, two) = PrefixIndex(), whole_blocks(range(32))
    first = index.enter(ROOT, one, 1)
    assert index.enter(ROOT, one, 2) == first
    assert 2 not in index
    index.enter(first, two, 3)
    assert index.find([one, two]) == [1, 3]


def test_a_reserved_prompt_is_cut_once_and_another_one_under_its_name_by_itself(monkeypatch):
    cut = []
    monkeypatch.setattr("worker.engine.engine.whole_blocks", lambda ids: cut.append(len(ids)) or whole_blocks(ids))
    _, engine = ledger()
    for prompt in (range(64), range(1, 65)):
        engine.reserve("a", list(range(64)))
        run(engine, sequence(prompt))
    assert cut == [64, 64, 64]  # two reservations, and the sequence that asks for something else
    assert engine.reserve("b", list(range(1, 65))) == 48
