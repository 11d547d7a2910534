// After the sampler: advance each sequence by its accepted draft tokens.
//
// A draft token is accepted if it is the token that the row before it has drawn, if that row's
// sequence continues, and if all draft tokens before it are accepted. The state after the last
// accepted row then is that of the sequence: the sampler has advanced it as the plain step would.
//
// Inputs: DraftRows of R ≤ 32 rows, a sequence's rows consecutive; all slots, after the sampler.
// Outputs: token, position, index and counts of the sequences' slots.
// Grid 1, block 32, one row a thread. Twin: `_Slot.accept` in worker/cpu/slots.py.
#include "draft_rows.cuh"
#include "pdl.cuh"

extern "C" __global__ void __launch_bounds__(32)
    accept_drafts(const DraftRows rows, const CopiedSlots slots, int count, int size) {
    grid_dependency_wait();
    const int row = threadIdx.x, slot = row < count ? rows.slots[row] : -1;
    if (slot < 0 || rows.sources[row] >= 0) return;
    int newest = slot;
    for (int next = row + 1; next < count && rows.sources[next] == slot; ++next) {
        if (slots.positions[newest] < 0 || slots.tokens[newest] != rows.tokens[next]) break;
        newest = rows.slots[next];
        if (slots.requests[slot].penalized) slots.counts[(size_t)slot * size + slots.tokens[newest]] += 1;
    }
    if (newest == slot) return;
    slots.tokens[slot] = slots.tokens[newest];
    slots.positions[slot] = slots.positions[newest];
    slots.requests[slot].index = slots.requests[newest].index;
}
