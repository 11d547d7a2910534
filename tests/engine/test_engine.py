"""The engine over the echo model: admission, steps, ends, blocks. Next: `test_exactness.py`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.ledger_runner import LedgerRunner
from tests.models import cpu_runner, engine_of, free_kv_blocks, ids, run
from worker.echo import EchoRunner
from worker.engine import Sequence
from worker.errors import InvalidRequest, VramOom
from worker.ops import Phase
from worker.sampling import Sampling


class RecordingRunner(LedgerRunner):
    """An echo that records its batches; its next `failures` batches raise VramOom."""

    failures = 0

    def __init__(self, kv_blocks=64):
        super().__init__(kv_blocks)

    def compute(self, batch, requests):
        if self.failures:
            self.failures -= 1
            raise VramOom("an allocation failed")
        return super().compute(batch, requests)


def sequence(name="a", prompt=(1, 2, 3), max_tokens=5, **kwargs):
    return Sequence(name, list(prompt), max_tokens, **kwargs)


def test_an_answer_of_max_tokens_ends_by_length():
    tokens = run(engine_of(EchoRunner(100, 8)), sequence(max_tokens=4))["a"]
    assert ids(tokens) == [1, 2, 3, 1]
    assert [t.index for t in tokens] == [0, 1, 2, 3]
    assert [t.finish for t in tokens] == [None, None, None, "length"]


def test_an_end_token_is_drawn_and_ends_the_answer():
    tokens = run(engine_of(EchoRunner(100, 8)), sequence(end_ids=frozenset({3}), max_tokens=9))["a"]
    assert ids(tokens) == [1, 2, 3]
    assert tokens[-1].finish == "stop"


def test_an_end_token_as_the_last_of_max_tokens_ends_by_stop():
    tokens = run(engine_of(EchoRunner(100, 8)), sequence(end_ids=frozenset({3}), max_tokens=3))["a"]
    assert tokens[-1].finish == "stop"


def test_with_ignore_eos_end_tokens_do_not_end_the_answer():
    answer = sequence(end_ids=frozenset({2}), sampling=Sampling(ignore_eos=True))
    assert ids(run(engine_of(EchoRunner(100, 8)), answer)["a"]) == [1, 2, 3, 1, 2]


def test_prompts_are_prefilled_in_chunks_and_only_the_last_requests_logits():
    runner = RecordingRunner()
    run(engine_of(runner, chunk=16), sequence(prompt=range(40), max_tokens=2))
    prefills = [b for b in runner.batches if b.phase is Phase.PREFILL]
    assert [b.positions.tolist() for b in prefills] == [list(range(16)), list(range(16, 32)), list(range(32, 40))]
    assert [b.logit_rows.tolist() for b in prefills] == [[], [], [7]]
    (decode,) = [b for b in runner.batches if b.phase is Phase.DECODE]
    assert (decode.tokens.tolist(), decode.positions.tolist()) == ([0], [40])


def test_one_runs_at_a_time_and_the_others_wait_in_order():
    engine = engine_of(EchoRunner(100, 64))
    for name in "abc":
        engine.add(sequence(name, max_tokens=2))
    order = []
    while not engine.idle:
        order += [t.sequence_id for t in engine.step()]
    assert order == ["a", "a", "b", "b", "c", "c"]


def test_running_sequences_advance_together():
    runner = RecordingRunner()
    jobs = [sequence(name, prompt=[n], max_tokens=3) for n, name in enumerate("abc")]
    run(engine_of(runner, running=3, chunk=192), *jobs)
    assert [len(b.tokens) for b in runner.batches if b.phase is Phase.DECODE] == [3, 3]


def test_a_step_that_failed_has_changed_nothing_and_can_be_repeated():
    runner = RecordingRunner()
    engine = engine_of(runner, chunk=16)
    engine.add(sequence(prompt=range(20), max_tokens=4))
    got = []
    for count in range(4):
        runner.failures = 2
        for _ in range(2):
            with pytest.raises(VramOom):
                engine.step()
        while len(got) <= count:
            got += engine.step()
    assert engine.idle
    assert [(t.index, t.draw.id) for t in got] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert free_kv_blocks(engine) == 64


def test_abort_frees_the_blocks_of_running_and_waiting_sequences():
    engine = engine_of(EchoRunner(100, 8))
    engine.add(sequence("a", max_tokens=50))
    engine.add(sequence("b", max_tokens=50))
    engine.step()
    assert free_kv_blocks(engine) < 8
    engine.abort("a")
    engine.abort("b")
    engine.abort("never seen")
    assert engine.idle
    assert free_kv_blocks(engine) == 8
    assert engine.step() == []


def test_two_sequences_that_do_not_fit_together_both_finish():
    engine = engine_of(LedgerRunner(4), running=2)
    tokens = run(engine, sequence("a", max_tokens=29), sequence("b", max_tokens=40))
    assert [len(t) for t in tokens.values()] == [29, 40]
    assert free_kv_blocks(engine) == 4


def test_replayed_tokens_go_through_decode_and_are_marked():
    runner = RecordingRunner()
    tokens = run(engine_of(runner), sequence(replay=[50, 60], max_tokens=4))["a"]
    assert ids(tokens) == [50, 60, 3, 1]  # the echo of index 2 is the prompt's third token
    assert [t.replayed for t in tokens] == [True, True, False, False]
    fed = [b.tokens.tolist() for b in runner.batches if b.phase is Phase.DECODE]
    assert fed == [[50], [60], [3]]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (sequence(prompt=[]), "prompt"),
        (sequence(max_tokens=0), "max_tokens"),
        (sequence(prompt=range(64)), "max_tokens"),
        (sequence(max_tokens=62), "max_tokens"),
        (sequence(prompt=[100]), "prompt_tokens"),
        (sequence(prompt=[-1]), "prompt_tokens"),
        (sequence(replay=[100]), "prompt_tokens"),
    ],
)
def test_a_sequence_that_can_never_run_is_refused_by_add(wrong, field):
    engine = engine_of(EchoRunner(100, 4))
    with pytest.raises(InvalidRequest) as refusal:
        engine.add(wrong)
    assert refusal.value.details["errors"][0]["field"] == field
    assert engine.idle


def test_context_is_the_smaller_of_setting_and_pool():
    assert engine_of(EchoRunner(100, 4), context=512).context == 64
    assert engine_of(EchoRunner(100, 400), context=512).context == 512


@pytest.mark.parametrize("chunk", [0, -16, 24])
def test_a_chunk_that_is_not_a_multiple_of_the_block_size_is_refused(chunk):
    with pytest.raises(ValueError, match="multiple of 16"):
        engine_of(EchoRunner(100, 4), chunk=chunk)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=8),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_after_any_mix_of_sequences_and_aborts_every_block_is_free(jobs, running, chance):
    order = list(range(8))
    chance.shuffle(order)
    engine = engine_of(LedgerRunner(8), running=running, order=order)
    counts = {}
    for n, (prompt, answer, _) in enumerate(jobs):
        engine.add(sequence(str(n), prompt=[n] * prompt, max_tokens=answer))
        counts[str(n)] = 0
    aborted = {str(n): after for n, (*_, after) in enumerate(jobs) if after}
    for _ in range(2000):
        if engine.idle:
            break
        for token in engine.step():
            assert token.index == counts[token.sequence_id]
            counts[token.sequence_id] += 1
        for name, after in aborted.items():
            if counts[name] >= after:
                engine.abort(name)
    assert free_kv_blocks(engine) == 8
    for n, (_, answer, _) in enumerate(jobs):
        assert counts[str(n)] == min(answer, aborted.get(str(n), answer))


class Launched(Exception):
    """Raised by an `on_launched` callback."""


def raise_launched():
    raise Launched


def test_each_step_that_computes_calls_on_launched_once():
    engine, calls = engine_of(EchoRunner(100, 8), chunk=16), []
    engine.add(sequence(prompt=range(40), max_tokens=3))
    while not engine.idle:
        engine.step(lambda: calls.append("launched"))
    assert len(calls) == 3 + 2
    assert engine.step(raise_launched) == []


def test_the_cpu_runner_calls_on_launched_before_it_computes(tiny):
    runner = cpu_runner(tiny("qwen2"))
    engine = engine_of(runner)
    engine.add(sequence())
    for _ in range(2):
        assert not np.any(runner.cache.k)
        with pytest.raises(Launched):
            engine.step(raise_launched)
    assert len(engine.step()) == 1
    assert np.any(runner.cache.k)


def test_a_paced_runner_calls_on_launched_before_its_pause(monkeypatch):
    order = []
    monkeypatch.setattr("worker.echo.time", SimpleNamespace(sleep=order.append))
    engine = engine_of(EchoRunner(100, 8, step_s=0.5))
    engine.add(sequence())
    engine.step(lambda: order.append("launched"))
    assert order == ["launched", 0.5]


def test_blocks_are_handed_out_in_the_order_given_and_returned():
    engine = engine_of(RecordingRunner(4), order=[3, 1, 0, 2])
    run(engine, sequence("a", max_tokens=30), sequence("b", max_tokens=30))
    tables = [b.block_tables[0].tolist() for b in engine._runner.batches if b.phase is Phase.PREFILL]
    assert tables == [[3, 1, 0], [3, 1, 0]]
    assert np.ndim(tables) == 2
