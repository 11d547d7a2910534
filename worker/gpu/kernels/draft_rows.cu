// Before a decode step with draft tokens: make the draft slots copies of their sequences' slots, as
// they will be if all draft tokens up to the row's are drawn.
//
// Inputs: DraftRows; the slots of sequences; size = V; blocks of a block table.
// Outputs: the draft slots: token, position, index and, if they matter, counts are advanced; a
// draft slot is inactive if its sequence is, or if the token lies at the sequence's limit or
// beyond.
// Grid (any number of blocks, R), block THREADS. A launch of its own before the step's graph, whose
// kernels read slots before their waits (pdl.cuh, rule 1).
// Bytes: V/8 + 4·blocks a row, and 8·V if the sequence has penalties.
// Twin: `_Slot.next_draws` in worker/cpu/slots.py.
#include "draft_rows.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    draft_rows(const DraftRows rows, const CopiedSlots slots, int size, int blocks) {
    const int row = blockIdx.y, slot = rows.slots[row], source = rows.sources[row];
    if (slot < 0 || source < 0) return;
    const int offset = rows.offsets[row], position = slots.positions[source] + offset;
    const bool active = slots.positions[source] >= 0 && position < slots.limits[source];
    const int first = blockIdx.x * THREADS + threadIdx.x, stride = gridDim.x * THREADS;
    if (first == 0) slots.positions[slot] = active ? position : -1;
    if (!active) return;
    if (first == 0) {
        slots.tokens[slot] = rows.tokens[row];
        slots.limits[slot] = slots.limits[source];
        slots.specials[slot] = slots.specials[source];
        Request request = slots.requests[source];
        request.index += offset;
        slots.requests[slot] = request;
    }
    if (first < ENDS) slots.ends[slot * ENDS + first] = slots.ends[source * ENDS + first];
    const size_t words = (size + 31) / 32;
    for (int i = first; i < words; i += stride) slots.marks[slot * words + i] = slots.marks[source * words + i];
    for (int i = first; i < blocks; i += stride)
        slots.tables[(size_t)slot * blocks + i] = slots.tables[(size_t)source * blocks + i];
    if (!slots.requests[source].penalized) return;
    for (int i = first; i < size; i += stride) {
        int seen = slots.counts[(size_t)source * size + i];
        for (int earlier = 0; earlier < offset; ++earlier) seen += rows.tokens[row - earlier] == i;
        slots.counts[(size_t)slot * size + i] = seen;
    }
}
