"""The engine: runs the batch that the scheduler chose and commits the drawn tokens.

Tokens are committed after the run, so a step that raised can be repeated. One thread owns an
engine. The runner (`worker/model.py`) computes. Read next: `scheduler.py`, `kv_blocks.py`.
"""

from array import array
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from worker.engine.kv_blocks import KvBlocks, split_full_blocks
from worker.engine.scheduler import EngineSettings, Scheduler, Sequence
from worker.errors import InvalidRequest, VramOom
from worker.model import OnLaunched, Runner
from worker.ops import KV_BLOCK, Batch, Phase
from worker.sampling import Draw, EngineFinishReason

_Ids: TypeAlias = npt.NDArray[np.uint32] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """One token of a sequence, drawn or replayed; `finish` is set on the last one."""

    sequence_id: str
    index: int
    draw: Draw
    replayed: bool
    """An earlier attempt has published it."""
    finish: EngineFinishReason | None


class Engine:
    """Sequences come in by `add`; each `step` computes one batch and returns the tokens drawn."""

    def __init__(self, runner: Runner, settings: EngineSettings, blocks: KvBlocks | None = None) -> None:
        self.settings = settings
        self._runner = runner
        self._blocks = blocks or KvBlocks(runner.kv_blocks)
        self._scheduler = Scheduler(self._blocks, settings)

    @property
    def context(self) -> int:
        """Longest sequence that can run, in tokens: bounded by the settings and the KV pool."""
        return min(self.settings.context, self._blocks.count * KV_BLOCK)

    @property
    def kv_blocks(self) -> dict[str, int]:
        """How many KV blocks are used, cached and free."""
        return self._blocks.states

    @property
    def active(self) -> list[str]:
        """The ids of all sequences that wait or run."""
        return self._scheduler.active

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing: no sequence waits or runs. Paused ones do not count."""
        return self._scheduler.idle

    def add(self, sequence: Sequence, *, paused: bool = False) -> int:
        """Queue a sequence, or keep it paused until `resume`; returns its cached prompt tokens.

        Those tokens are not computed: their KV blocks are held from now on. The hold is given up
        only if no sequence could start otherwise. Ids must be unique. Raises InvalidRequest if the
        sequence can never fit, or if a token id is outside of the vocabulary.
        """
        self._check(sequence)
        ids = _as_array(sequence.prompt)
        self._check_ids(ids)
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
        self._scheduler.remove(sequence_id)

    def step(self, on_launched: OnLaunched = lambda: None) -> list[DrawnToken]:
        """Compute one prefill chunk, or one token of every running sequence.

        Raises what the runner raises. For `on_launched` see `Runner.run`.
        """
        scheduled = self._scheduler.schedule()
        if scheduled is None:
            return []
        batch, sequences = scheduled
        drawing = sequences if len(batch.logit_rows) else []
        draws = self._run(batch, drawing, on_launched)
        if batch.phase is Phase.PREFILL:
            self._scheduler.prefilled(sequences[0], len(batch.tokens))
        return [self._commit(sequence, draw) for sequence, draw in zip(drawing, draws, strict=True)]

    def _run(self, batch: Batch, drawing: list[Sequence], on_launched: OnLaunched) -> list[Draw]:
        try:
            return self._runner.run(batch, [s.next_draw() for s in drawing], on_launched)
        except (VramOom, MemoryError):
            raise  # the launched part wrote only blocks that are not in the prefix cache
        except Exception:
            self._scheduler.clear_cache()  # what the device's memory holds is uncertain
            raise

    def _commit(self, sequence: Sequence, draw: Draw) -> DrawnToken:
        index = len(sequence.generated)
        sequence.generated.append(draw.id)
        finish = sequence.finish_at(index, draw.id)
        if finish:
            self._scheduler.remove(sequence.id)
        return DrawnToken(sequence.id, index, draw, index < len(sequence.replay), finish)

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
