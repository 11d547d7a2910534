// Rows of a decode step with draft tokens, and the arrays of all slots.
//
// A sequence's first row is its slot. Each of the following rows has a draft slot: a copy of the
// sequence's slot, advanced by the draft tokens up to this row's. So every kernel of the step
// computes a draft row as the row of one more sequence, and needs to know nothing about drafts.
// Users: draft_rows.cu, accept_drafts.cu.
#pragma once
#include "sampling.cuh"

struct DraftRows {  // [R] each
    const int* slots;    // -1: no row
    const int* sources;  // of a draft row, the sequence's slot; -1 for other rows
    const int* offsets;  // draft tokens of the sequence up to this row's
    const int* tokens;   // the draft token
};

struct CopiedSlots {  // SlotArrays and the block tables, writable
    unsigned int* marks;
    Specials* specials;
    int *counts, *tokens, *positions;
    Request* requests;
    int *ends, *limits, *tables;
};
static_assert(sizeof(DraftRows) == DRAFT_ROWS_BYTES, "_ROWS of worker/gpu/drafts.py");
static_assert(sizeof(CopiedSlots) == COPIED_SLOTS_BYTES, "_SLOTS of worker/gpu/drafts.py");
