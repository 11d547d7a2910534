"""The launcher of draft rows: rows of a decode step that verify draft tokens.

A draft row has a draft slot, beyond the slots of sequences in `StepState` and sampler. Before the
step `draft_rows.cu` makes it a copy of the sequence's slot, advanced by the draft tokens up to its
own; after the sampler `accept_drafts.cu` advances the sequence's slot by the accepted ones. In
between, a step with draft rows is one of more sequences, except that `kv_rows.cu` writes all keys
and values before attention (`decode_attention.py`). Twin: `worker/cpu/slots.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Launcher
from worker.gpu.memory import DeviceMemory
from worker.gpu.sampler import DEFINES as _SAMPLER_DEFINES
from worker.gpu.sampler import SamplerLauncher
from worker.gpu.state import StepState, WholeInputs
from worker.model import MAX_DRAFT_ROWS

DRAFT_SLOTS = MAX_DRAFT_ROWS - 1
"""Draft tokens of a step at most."""

_COPY_BLOCKS = 8  # of a row
_ROWS = np.dtype([(name, "u8") for name in ("slots", "sources", "counts", "tokens")])
"""`DraftRows` of draft_rows.cuh."""
_SLOTS = np.dtype(
    [
        (name, "u8")
        for name in ("marks", "specials", "counts", "tokens", "positions", "requests", "ends", "limits", "tables")
    ]
)
"""`CopiedSlots` of draft_rows.cuh."""

DEFINES: Mapping[str, int] = {
    **_SAMPLER_DEFINES,
    "DRAFT_ROWS_BYTES": _ROWS.itemsize,
    "COPIED_SLOTS_BYTES": _SLOTS.itemsize,
}
INSTANTIATIONS: tuple[KernelName, ...] = (("draft_rows.cu", "draft_rows"), ("accept_drafts.cu", "accept_drafts"))


class StepRow(NamedTuple):
    """A row of a step with draft tokens. Without the last three fields, a sequence's own row."""

    slot: int
    source: int = -1
    """Of a draft row, the sequence's slot."""
    offset: int = 0
    """Draft tokens of the sequence up to this row's."""
    token: int = 0


class DraftLauncher:
    """Rows of steps with at most DRAFT_SLOTS draft tokens, in slots from `state.slots` on.

    `processors` is the device's number of multiprocessors.
    """

    def __init__(self, memory: DeviceMemory, state: StepState, sampler: SamplerLauncher, processors: int) -> None:
        self._inputs = WholeInputs(memory, [((MAX_DRAFT_ROWS,), np.int32)] * len(StepRow._fields))
        self.state = state.with_rows(self._inputs.arrays[0])
        """The step state, whose rows are those of the newest `load`."""
        self._grid = min(_COPY_BLOCKS, processors), MAX_DRAFT_ROWS
        self._first_slot = state.slots
        arrays = (
            *sampler.copied,
            *(state.tokens, state.positions, state.requests, state.ends, state.limits, state.tables),
        )
        self._rows = np.array(tuple(array.data.ptr for array in self._inputs.arrays), _ROWS)
        self._slots = np.array(tuple(array.data.ptr for array in arrays), _SLOTS)
        self._vocab_size = np.int32(sampler.vocab_size)
        self._blocks = np.int32(state.tables.shape[1])

    def load(self, drafts: Sequence[tuple[int, Sequence[int]]], stream: Any) -> int:
        """Upload the rows of a step: slots in order, each with its draft tokens.

        Returns the number of rows.
        """
        rows: list[StepRow] = []
        unused = self._first_slot
        for slot, tokens in drafts:
            rows.append(StepRow(slot))
            for offset, token in enumerate(tokens, 1):
                rows.append(StepRow(unused, slot, offset, token))
                unused += 1
        padding = [StepRow(-1)] * (MAX_DRAFT_ROWS - len(rows))
        self._inputs.upload(list(np.array([*rows, *padding], np.int32).T.copy()), stream)
        return len(rows)

    def copy_slots(self, kernels: Launcher) -> None:
        """Launch the copies of the sequences' slots."""
        args = (self._rows, self._slots, self._vocab_size, self._blocks)
        kernels.get("draft_rows.cu", "draft_rows")(self._grid, (_SAMPLER_DEFINES["THREADS"],), args)

    def accept(self, kernels: Launcher, rows: int) -> None:
        """Launch the acceptance of the draft tokens of a step of at most `rows` rows."""
        args = (self._rows, self._slots, np.int32(rows), self._vocab_size)
        kernels.get("accept_drafts.cu", "accept_drafts")((1,), (32,), args, pdl=True)
