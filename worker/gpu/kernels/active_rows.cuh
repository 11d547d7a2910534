// Which rows of a decode step belong to a slot that generates.
//
// Row r belongs to slot row_slots[r] (-1: none); a slot with a negative position is inactive.
// Without row_slots every row is active. Both arrays are constant during a step (pdl.cuh).
#pragma once

struct ActiveRows {
    const int *row_slots, *positions;
    __device__ __forceinline__ bool operator[](int row) const {
        if (!row_slots) return true;
        const int slot = row_slots[row];
        return slot >= 0 && positions[slot] >= 0;
    }
};
