"""Any order of joins, pauses, aborts, ends, preemptions and faults changes no id and loses no block.

The ids of `DigestRunner` depend on all tokens that it reads through the block tables, so a block
that is stale, too short or handed out twice changes an id. With lookahead the runner computes a step
before the engine knows whether it is needed.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.ledger_runner import DigestRunner, LookaheadRunner, alone
from tests.models import engine_of
from worker.engine import FailedSequence, Sequence
from worker.errors import CudaError, VramOom
from worker.ops import KV_BLOCK

BLOCKS, UNFIT = 14, 99
TRUNK = list(range(60))
PROMPTS = (TRUNK, [*TRUNK[:32], *range(60, 90)], [UNFIT, *range(40)])
"""The second begins like the first. No token can be drawn after the third."""
MANY = settings(max_examples=120, stateful_step_count=40)


class Batching(RuleBasedStateMachine):
    @initialize(
        order=st.permutations(range(BLOCKS)),
        running=st.sampled_from([1, 2, 3, 8]),
        chunk=st.sampled_from([16, 32, 256]),
        beside=st.sampled_from([16, 128]),
        kind=st.sampled_from([DigestRunner, LookaheadRunner]),
        speculation=st.sampled_from(["off", "ngram"]),
    )
    def begin(self, order, running, chunk, beside, kind, speculation):
        self.runner = kind(BLOCKS)
        self.runner.unfit = UNFIT
        sizes = {"context": BLOCKS * KV_BLOCK, "chunk": chunk, "beside": beside}
        sizes["speculation"] = speculation
        self.engine = engine_of(self.runner, running=running, order=order, **sizes)
        self.scheduler = self.engine._scheduler
        self.names, self.alive, self.paused, self.failed = 0, {}, {}, set()
        self.taken = Counter()

    @rule(
        which=st.sampled_from([0, 0, 1, 1, 2]),
        length=st.integers(1, 41),
        tokens=st.integers(1, 60),
        ends=st.frozensets(st.integers(0, 99), max_size=4),
        replay=st.integers(0, 9),
        priority=st.integers(0, 2),
        tenant=st.sampled_from(["", "a"]),
        paused=st.booleans(),
    )
    def add(self, which, length, tokens, ends, replay, priority, tenant, paused):
        prompt = PROMPTS[which][:length]
        published = alone(prompt, tokens, ends)[:-1][:replay]
        sequence = Sequence(str(self.names), prompt, tokens, end_ids=ends, replay=published)
        sequence.priority, sequence.tenant = priority, tenant
        self.names += 1
        assert self.engine.add(sequence, paused=paused) <= (len(prompt) - 1) // KV_BLOCK * KV_BLOCK
        (self.paused if paused else self.alive)[sequence.id] = sequence

    @precondition(lambda self: self.paused)
    @rule(chance=st.randoms(use_true_random=False), tokens=st.integers(1, 40))
    def resume(self, chance, tokens):
        name = chance.choice(sorted(self.paused))
        self.alive[name] = Sequence(name, self.paused.pop(name).prompt, tokens)
        self.engine.resume(self.alive[name])

    @precondition(lambda self: self.alive or self.paused)
    @rule(chance=st.randoms(use_true_random=False))
    def abort(self, chance):
        name = chance.choice(sorted([*self.alive, *self.paused]))
        self.alive.pop(name, None)
        self.paused.pop(name, None)
        self.engine.abort(name)

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        for _ in range(count):
            self.take(self.engine.step())

    @precondition(lambda self: any(self.scheduler.slots))
    @rule(chance=st.randoms(use_true_random=False))
    def preempt(self, chance):
        sequence = chance.choice([each for each in self.scheduler.slots if each])
        self.runner.stop(sequence.slot)
        self.scheduler._requeue(sequence)

    @rule(fault=st.sampled_from([VramOom("full"), CudaError("lost"), ZeroDivisionError("a bug")]))
    def fail_a_step(self, fault):
        self.runner.fault = fault
        try:
            self.take(self.engine.step())
        except type(fault):
            assert not any(self.scheduler.slots)
        self.runner.fault = None

    def take(self, tokens):
        """Check the tokens of a step; a sequence that ends has the ids that it has alone."""
        several = self.engine.settings.speculation == "ngram"
        assert several or len({token.sequence_id for token in tokens}) == len(tokens)
        for token in tokens:
            sequence = self.alive[token.sequence_id]
            if isinstance(token, FailedSequence):
                assert sequence.prompt[0] == UNFIT
                del self.alive[sequence.id]
                continue
            assert token.index == self.taken[sequence.id]
            assert token.draw.id == sequence.generated[token.index]
            self.taken[sequence.id] += 1
            assert token.replayed == (token.index < len(sequence.replay))
            if token.finish:
                assert sequence.generated == alone(sequence.prompt, sequence.max_tokens, sequence.end_ids)
                del self.alive[sequence.id]

    @invariant()
    def every_block_has_its_readers(self):
        if not hasattr(self, "engine"):
            return
        tables = [s.block_table.tolist() for s in self.sequences() if s.block_table is not None]
        readers = Counter(block for table in tables for block in table)
        assert self.engine._blocks._readers.tolist() == [readers[block] for block in range(BLOCKS)]
        states = self.engine.kv_blocks
        assert sum(states.values()) == BLOCKS
        assert states["used"] == len(readers)
        assert all(len(set(table)) == len(table) for table in tables)

    @invariant()
    def only_blocks_of_equal_prompts_are_shared(self):
        if not hasattr(self, "engine"):
            return
        contents = {}
        for sequence in self.sequences():
            for n, block in enumerate([] if sequence.block_table is None else sequence.block_table.tolist()):
                full = (n + 1) * KV_BLOCK <= len(sequence.prompt)
                content = tuple(sequence.prompt[: (n + 1) * KV_BLOCK]) if full else sequence.id
                assert contents.setdefault(block, content) == content

    @invariant()
    def every_running_sequence_has_a_slot(self):
        if not hasattr(self, "engine"):
            return
        slots = self.scheduler.slots
        assert all(each is None or each.slot == n for n, each in enumerate(slots))
        assert sorted(self.scheduler._free_slots) == [n for n, each in enumerate(slots) if each is None]
        assert {each.id for each in slots if each} | {s.id for s in self.scheduler._waiting} == set(self.alive)
        assert set(self.runner._generating) <= {n for n, each in enumerate(slots) if each}

    def sequences(self):
        scheduler = self.scheduler
        return [*scheduler._paused.values(), *scheduler._waiting, *scheduler._running]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if self.engine.idle:
                break
            self.steps(1)
        assert not self.alive, "a sequence never ended"
        for name in self.paused:
            self.engine.abort(name)
        assert self.engine.kv_blocks["used"] == 0


Batching.TestCase.settings = MANY
TestBatching = Batching.TestCase
