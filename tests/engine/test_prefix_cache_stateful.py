"""Any order of sequences, pauses, aborts and faults loses no block and overwrites none in use.

A slot of `LedgerRunner` holds all tokens before it, so a block that was handed out twice, or found
below a wrong node, fails the step that reads it. The prompts are beginnings of three that branch.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.ledger_runner import LedgerRunner
from tests.models import engine_of, free_kv_blocks
from worker.engine import Sequence
from worker.errors import VramOom
from worker.ops import KV_BLOCK, Phase

BLOCKS = 12
TRUNK = list(range(60))
PROMPTS = (TRUNK, [*TRUNK[:32], *range(60, 90)], [*TRUNK[:20], *range(90, 99)])


class PrefixCache(RuleBasedStateMachine):
    @initialize(order=st.permutations(range(BLOCKS)), running=st.integers(1, 3), chunk=st.sampled_from([16, 32]))
    def begin(self, order, running, chunk):
        self.runner = LedgerRunner(BLOCKS)
        self.engine = engine_of(self.runner, context=BLOCKS * KV_BLOCK, chunk=chunk, running=running, order=order)
        self.names, self.alive, self.paused = 0, {}, {}

    @rule(which=st.integers(0, 2), length=st.integers(1, 62), tokens=st.integers(1, 40), paused=st.booleans())
    def add(self, which, length, tokens, paused):
        prompt, name = PROMPTS[which][:length], str(self.names)
        self.names += 1
        sequence = Sequence(name, prompt, tokens)
        cached = self.engine.add(sequence, paused=paused)
        assert cached < len(prompt)
        assert cached % KV_BLOCK == 0
        (self.paused if paused else self.alive)[name] = sequence

    @precondition(lambda self: self.paused)
    @rule(chance=st.randoms(use_true_random=False), tokens=st.integers(1, 40))
    def resume(self, chance, tokens):
        name = chance.choice(sorted(self.paused))
        self.alive[name] = Sequence(name, self.paused.pop(name).prompt, tokens)
        self.engine.resume(self.alive[name])

    @precondition(lambda self: self.paused)
    @rule(chance=st.randoms(use_true_random=False))
    def abort_a_paused_sequence(self, chance):
        name = chance.choice(sorted(self.paused))
        del self.paused[name]
        self.engine.abort(name)

    @precondition(lambda self: self.alive)
    @rule(chance=st.randoms(use_true_random=False))
    def abort(self, chance):
        name = chance.choice(sorted(self.alive))
        del self.alive[name]
        self.engine.abort(name)

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        for _ in range(count):
            for token in self.engine.step():
                if token.finish:
                    del self.alive[token.sequence_id]

    @rule(fault=st.sampled_from([VramOom("full"), ZeroDivisionError("a bug")]), aborted=st.booleans())
    def fail_a_step(self, fault, aborted):
        self.runner.fault = fault
        try:
            self.engine.step()
        except type(fault):
            if aborted:
                for name in list(self.alive):
                    self.engine.abort(name)
                self.alive.clear()
        self.runner.fault = None

    @invariant()
    def every_block_is_in_one_place(self):
        if hasattr(self, "engine"):
            states = self.engine.kv_blocks
            assert sum(states.values()) == BLOCKS
            assert free_kv_blocks(self.engine) == states["cached"] + states["free"]

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
        assert all(batch.phase is Phase.DECODE or batch.positions[0] % KV_BLOCK == 0 for batch in self.runner.batches)


PrefixCache.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPrefixCache = PrefixCache.TestCase
