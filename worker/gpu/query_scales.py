"""Launcher of the scale of queries by their position, in both phases, before RoPE.

Kernel: `scale_queries.cu`. Twin: `CpuOps.attention` in `worker/cpu/ops.py`. Models without such a
scale have no launch.
"""

from collections.abc import Iterable

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Launcher
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, aligned
from worker.gpu.prefill_state import DEFINES as _BATCH_DEFINES
from worker.gpu.prefill_state import PrefillState
from worker.gpu.state import StepState
from worker.ops import Attention, PositionScale

DEFINES = _BATCH_DEFINES
INSTANTIATIONS: tuple[KernelName, ...] = (("scale_queries.cu", "scale_queries"),)
_THREADS, _BLOCKS = 256, 4  # blocks of a row


def query_scale_bytes(specs: Iterable[Attention]) -> int:
    """Device memory of the tables of the layers' query scales."""
    contexts = {(spec.query_scale, spec.rope.context) for spec in specs if spec.query_scale is not None}
    return sum(aligned(4 * context) for _, context in contexts)


class QueryScales:
    """The tables of a model's scales, uploaded on first use and shared by the layers."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._tables: dict[tuple[PositionScale, int], DeviceArray] = {}

    def prefill(self, kernels: Launcher, q: DeviceArray, spec: Attention, batch: PrefillState) -> None:
        """Scale the rows of q [T, H·D] f32 of a batch, in place, if `spec` has a scale."""
        self._launch(kernels, q, spec, batch.rows, None, None)

    def decode(self, kernels: Launcher, q: DeviceArray, spec: Attention, state: StepState) -> None:
        """Scale the rows of q [R, H·D] f32 of a decode step, in place, if `spec` has a scale."""
        self._launch(kernels, q, spec, None, state.slots_of_rows(len(q)), state.positions)

    def _launch(
        self,
        kernels: Launcher,
        q: DeviceArray,
        spec: Attention,
        rows: DeviceArray | None,
        row_slots: DeviceArray | None,
        positions: DeviceArray | None,
    ) -> None:
        if spec.query_scale is None:
            return
        table = self._table(spec.query_scale, spec.rope.context)
        kernels.get(*INSTANTIATIONS[0])(
            (len(q), _BLOCKS),
            (_THREADS,),
            (q, table, rows, row_slots, positions, np.int32(q.shape[1]), np.int32(len(table))),
            pdl=True,
        )

    def _table(self, scale: PositionScale, context: int) -> DeviceArray:
        key = scale, context
        if key not in self._tables:
            values = scale.at(np.arange(context))
            self._tables[key] = self._memory.reserve(values.nbytes, Purpose.WORKSPACE).array((context,), np.float32)
            self._tables[key].set(values)
        return self._tables[key]
