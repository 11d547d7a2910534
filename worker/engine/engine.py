"""The engine: runs the step that the scheduler chose and commits the drawn tokens.

After a step that raised, all running sequences are computed again. One thread owns an engine. The
runner (`worker/model.py`) computes. Read next: `scheduler.py`, `kv_blocks.py`.
"""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from worker.engine.kv_blocks import KvBlocks, split_full_blocks
from worker.engine.scheduler import EngineSettings, Scheduler, Step
from worker.engine.sequence import NO_SLOT, Sequence
from worker.engine.speculation import Speculation
from worker.errors import Internal, InvalidRequest, VramOom
from worker.model import OnLaunched, Runner, SlotDraw, StepWait
from worker.ops import KV_BLOCK
from worker.sampling import Draw, EngineFinishReason

_Ids: TypeAlias = npt.NDArray[np.uint32] | npt.NDArray[np.int64]


class DrawnToken(NamedTuple):
    """One token of a sequence, drawn or replayed; `finish` is set on the last one."""

    sequence_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index
    draw: Draw
    replayed: bool
    """An earlier attempt has published it."""
    finish: EngineFinishReason | None


@dataclass(frozen=True, slots=True)
class FailedSequence:
    """A sequence that the engine has ended without a token. The others are not affected."""

    sequence_id: str
    error: Internal | InvalidRequest


class Engine:
    """Sequences come in by `add`; each `step` advances those that run and returns new tokens."""

    def __init__(self, runner: Runner, settings: EngineSettings, blocks: KvBlocks | None = None) -> None:
        if settings.max_running > runner.slots:
            raise ValueError(f"max_running {settings.max_running} is above the runner's {runner.slots} slots")
        self.settings = settings
        self._runner = runner
        self._blocks = blocks or KvBlocks(runner.kv_blocks)
        self._speculation: Speculation | None = None
        if settings.speculation == "ngram" and runner.drafts is not None:
            self._speculation = Speculation(runner.drafts)
        self._scheduler = Scheduler(self._blocks, settings, self._speculation.margin if self._speculation else 0)

    @property
    def context(self) -> int:
        """Longest sequence that can run, in tokens: bounded by the settings and the KV pool."""
        return min(self.settings.context, self._blocks.count * KV_BLOCK)

    @property
    def kv_blocks(self) -> dict[str, int]:
        """How many KV blocks are used, cached and free."""
        return self._blocks.states

    @property
    def sequences(self) -> tuple[int, int, int]:
        """How many sequences run and wait, and how often one was preempted."""
        return self._scheduler.running, self._scheduler.waiting, self._scheduler.preemptions

    @property
    def draft_tokens(self) -> tuple[int, int]:
        """How many draft tokens were verified and accepted since the start."""
        speculation = self._speculation
        return (0, 0) if speculation is None else (speculation.proposed, speculation.accepted)

    @property
    def active(self) -> list[str]:
        """The ids of all sequences that wait or run."""
        return self._scheduler.active

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing: no sequence waits or runs. Paused ones do not count."""
        return self._scheduler.idle

    @property
    def has_room(self) -> bool:
        """Whether an added sequence may start in the next step, which has no chunk yet."""
        return self._scheduler.has_room

    @property
    def step_wait(self) -> StepWait | None:
        """See `Runner.step_wait`."""
        return self._runner.step_wait

    def add(self, sequence: Sequence, *, paused: bool = False) -> int:
        """Queue a sequence, or keep it paused until `resume`; returns its cached prompt tokens.

        Those tokens are not computed: their KV blocks are held from now on. The hold is given up
        only if no sequence could start otherwise. Ids must be unique. Raises InvalidRequest if the
        sequence can never fit, or if a token id is outside of the vocabulary.
        """
        self._check(sequence)
        ids = _as_array(sequence.prompt)
        self._check_ids(ids)
        sequence.ids = ids.view(np.int32)
        sequence.full_blocks = split_full_blocks(ids) if self.settings.prefix_cache else []
        return self._scheduler.add(sequence, paused=paused)

    def resume(self, sequence: Sequence) -> None:
        """Queue `sequence`, the final form of the paused one that has its id and prompt.

        Raises InvalidRequest as `add` does, and ValueError if there is no such paused sequence.
        """
        self._check(sequence)
        self._scheduler.resume(sequence)

    def abort(self, sequence_id: str) -> None:
        """Remove a sequence in any state and release its blocks. Does nothing if there is none."""
        slot = self._scheduler.remove(sequence_id)
        if slot != NO_SLOT:
            self._runner.stop(slot)

    def step(self, on_launched: OnLaunched = lambda: None) -> list[DrawnToken | FailedSequence]:
        """Compute chunks of prompts within the prefill budget, and a token of each other sequence.

        One token of a sequence is returned, and one more for each accepted draft token. For
        `on_launched` see `Runner.run`. After a step that completed prompts, the next one may return
        their first tokens only: see `first_tokens`.

        Raises what the runner raises. The running sequences wait again then, to be computed anew:
        no token is lost or returned twice. Unless memory was short, the prefix cache is emptied.
        """
        if first := self.first_tokens():
            return first
        step = self._scheduler.schedule()
        if step is None:
            return []
        speculation = self._speculation
        drafts = speculation.propose(self._scheduler.generating, self._scheduler.running) if speculation else ()
        draws = self._guarded(partial(self._run, step, drafts, on_launched))
        if step.chunks:
            self._scheduler.computed(step)
        if speculation is None:
            return self._commit(draws)
        returned = speculation.returned()
        tokens = self._commit(draws)
        speculation.count(returned)
        return tokens

    def first_tokens(self) -> list[DrawnToken | FailedSequence]:
        """Wait for the first tokens of the prompts that the last step has completed.

        If this is not called, `step` returns them alone. Raises as `step` does.
        """
        return self._commit(self._guarded(self._runner.first_draws))

    def _run(self, step: Step, drafts: Iterable[tuple[int, list[int]]], on_launched: OnLaunched) -> list[SlotDraw]:
        runner = self._runner
        for slot in step.stopped:
            runner.stop(slot)
        for sequence in step.extended:
            assert sequence.block_table is not None
            runner.extend(sequence.slot, sequence.block_table)
        for slot, ids in drafts:
            runner.propose(slot, ids)
        return runner.run(step.chunks, on_launched)

    def _guarded(self, use_runner: Callable[[], list[SlotDraw]]) -> list[SlotDraw]:
        """Use the runner; if it raises, reset it and let all running sequences wait again."""
        try:
            return use_runner()
        except Exception as error:
            self._runner.reset()
            if self._speculation is not None:
                self._speculation.reset()
            # After a failed allocation, the launched part has written only blocks of this step.
            if not isinstance(error, (VramOom, MemoryError)):
                self._scheduler.clear_cache()  # what the device's memory holds is uncertain
            self._scheduler.restart()
            raise

    def _commit(self, draws: Iterable[SlotDraw]) -> list[DrawnToken | FailedSequence]:
        slots, short = self._scheduler.slots, self._scheduler.short
        tokens: list[DrawnToken | FailedSequence] = []
        drawn, new = DrawnToken, tuple.__new__  # a third of the time of a call of the class
        for slot, draw in draws:
            sequence = slots[slot]
            assert sequence is not None, "the runner drew for a slot that is stopped"
            if not isinstance(draw, Draw):
                tokens.append(self._fail(sequence, draw))
                continue
            sequence.room -= 1
            if not sequence.room:
                short.append(sequence)
            if sequence.recomputed:
                sequence.recomputed -= 1
                continue
            token, generated, finish = draw[0], sequence.generated, None
            index = len(generated)
            generated.append(token)
            if token in sequence.ends or index + 1 >= sequence.max_tokens:
                finish = sequence.finish_at(index, token)
                self._runner.stop(self._scheduler.finish(sequence))
            tokens.append(new(drawn, (sequence.id, index, draw, index < len(sequence.replay), finish)))
        return tokens

    def _fail(self, sequence: Sequence, error: InvalidRequest | None) -> FailedSequence:
        self._runner.stop(self._scheduler.finish(sequence))
        not_finite = Internal("the model's logits are not finite, so no token can be drawn")
        return FailedSequence(sequence.id, error or not_finite)

    def _check(self, sequence: Sequence) -> None:
        left = self.context - len(sequence.prompt)
        if not sequence.prompt:
            raise InvalidRequest.of(("prompt", "must hold at least one token", 0))
        if not 1 <= sequence.max_tokens <= left:
            raise InvalidRequest.of(
                ("max_tokens", f"must be 1 to {left}, what the context leaves", sequence.max_tokens)
            )
        self._check_ids(_as_array(sequence.replay))

    def _check_ids(self, ids: _Ids) -> None:
        size = self._runner.vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise InvalidRequest.of(("prompt_tokens", f"ids must be 0 to {size - 1}", None))


def _as_array(ids: list[int]) -> _Ids:
    """Token ids as an array. `array` converts a list in a third of NumPy's time."""
    try:
        return np.frombuffer(array("I", ids), np.uint32)
    except OverflowError:  # a negative id, or one above 2**32; neither is in a vocabulary
        return np.array(ids, np.int64)
