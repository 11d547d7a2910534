// Data of sample.cu: slots, the request and result of one row, adjusted scores, the best of a
// block.
//
// The structs mirror NumPy dtypes of worker/gpu/state.py and sampler.py, which define their sizes
// (REQUEST_BYTES …), THREADS, TOP, ENDS and LOGPROB_SLICES. The kernel exists twice: with MASKED 0
// it draws for sequences without a grammar, with MASKED 1 for those with one.
// Twin: worker/cpu/sampler.py.
#pragma once
#include "grid.cuh"
#include "warp.cuh"

#ifndef MASKED
#define MASKED 0
#endif
constexpr bool kMasked = MASKED;
constexpr double kOne = 17592186044416.0;  // 2^44: a sum of a million of them fits in 64 bits

struct Request {
    double temperature, top_p, min_p, repetition, frequency, presence;
    u64 seed;
    int index, min_tokens, top_k, logprobs, forced, penalized, biased, masked;
};
static_assert(sizeof(Request) == REQUEST_BYTES, "REQUEST of worker/gpu/state.py");

struct Drawn {
    int id, count;
    double logprob;
    double top_logprobs[TOP];
    int top_ids[TOP];
};
constexpr int kInactive = -2;  // the id of a row without an active slot; -1: no token could be drawn
static_assert(sizeof(Drawn) == DRAWN_BYTES, "DRAWN of worker/gpu/sampler.py");

// Over some ids: highest score and its lowest id, highest raw logit, whether any score is NaN.
struct Best {
    double score, raw;
    int id, broken;
};

// An id of a slot whose score is not its raw logit: a bias, or a stop token masked before
// min_tokens.
struct Special {
    double bias;
    int id, stop;
};
static_assert(sizeof(Special) == SPECIAL_BYTES, "SPECIAL of worker/gpu/sampler.py");

struct Specials {  // of one slot, ascending ids
    const Special* list;
    int count, unused;
};
static_assert(sizeof(Specials) == SPECIALS_BYTES, "SPECIALS of worker/gpu/sampler.py");

// What the slots' draws depend on besides their requests.
struct SlotArrays {
    const unsigned char* mask;   // [V]: 1: padding, 2: end token
    const unsigned int* marks;   // [S, ceil(V / 32)]: bit i: id i has a mask or is in the slot's list
    const Specials* specials;    // [S]
    int* counts;                 // [S, V] of the tokens that penalties count
    int *tokens, *positions;     // [S]; position < 0: the slot is inactive
    Request* requests;           // [S]
    const int *ends, *limits;    // [S, ENDS], -1 padded; [S]: the last token's position
    // Only with MASKED 1: the grammars' masks of this launch.
    const int* allowed_rows;      // [R]: the number of the row's mask; -1: the row draws nothing
    const unsigned int* allowed;  // [masks, ceil(V / 32)]: bit i: id i is allowed
};
static_assert(sizeof(SlotArrays) == SLOT_ARRAYS_BYTES, "SLOT_ARRAYS of worker/gpu/sampler.py");

struct Logits {  // one row, with the masks, counts and biases of its slot
    const float* raw;
    const unsigned char* mask;
    const unsigned int* marks;
    const int* counts;
    Specials specials;
    int size;
    const unsigned int* allowed;  // only with MASKED 1: the row's mask

    Logits() = default;
    __device__ Logits(const float* raw, const SlotArrays& slots, int slot, int size)
        : raw(raw), mask(slots.mask), marks(slots.marks + (size_t)slot * ((size + 31) / 32)),
          counts(slots.counts + (size_t)slot * size), specials(slots.specials[slot]), size(size) {}
};

// A copy in shared memory of what commit() needs of the slot: read before the wait.
struct SequenceEnd {
    int4 ends[ENDS / 4];
    int limit, position, index, penalized;
};
static_assert(ENDS % 4 == 0 && ENDS + 4 <= 32, "load_end is called by the lanes of a warp, among others");

struct Sequence {  // the row's state in device memory, advanced by the drawn token
    int *token, *position, *counts;
    Request* request;
    Drawn* drawn;
    const SequenceEnd* end;

    Sequence() = default;
    __device__ Sequence(const SlotArrays& slots, int slot, int size, Drawn* drawn, const SequenceEnd* end)
        : token(slots.tokens + slot), position(slots.positions + slot), counts(slots.counts + (size_t)slot * size),
          request(slots.requests + slot), drawn(drawn), end(end) {}
};

__device__ __forceinline__ void load_end(SequenceEnd& end, const SlotArrays& slots, int slot) {
    const int t = threadIdx.x;
    if (t < ENDS) reinterpret_cast<int*>(end.ends)[t] = slots.ends[slot * ENDS + t];
    if (t == ENDS) end.limit = slots.limits[slot];
    if (t == ENDS + 1) end.position = slots.positions[slot];
    if (t == ENDS + 2) end.index = slots.requests[slot].index;
    if (t == ENDS + 3) end.penalized = slots.requests[slot].penalized;
}

__device__ __forceinline__ unsigned int philox_word(u64 seed, unsigned int index) {
    unsigned int c0 = index, c1 = 0, c2 = 0, c3 = 0, k0 = (unsigned int)seed, k1 = (unsigned int)(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const unsigned int h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        const unsigned int h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    }
    return c0;
}

// Whether the launch draws for this row. A sequence with a grammar has a launch of its own, with
// its mask, unless its next id is forced.
__device__ __forceinline__ bool draws_in_launch(const Request& r, const SlotArrays& slots, int row) {
    return kMasked ? slots.allowed_rows[row] >= 0 : r.forced >= 0 || !r.masked;
}

__device__ __forceinline__ const unsigned int* mask_of(const SlotArrays& slots, int row, int size) {
    return slots.allowed + (size_t)max(0, slots.allowed_rows[row]) * ((size + 31) / 32);
}

// Whether the grammar does not allow an id.
__device__ __forceinline__ bool denied(const Logits& row, int id) {
    if (!kMasked) return false;
    __builtin_assume(__isGlobal(row.allowed));
    return !(row.allowed[id >> 5] >> (id & 31) & 1);
}

// The slot's entry of an id, or null.
__device__ __noinline__ const Special* find(const Specials& specials, int id) {
    int lo = 0, hi = specials.count;
    while (lo < hi) {
        const int middle = (lo + hi) / 2;
        if (specials.list[middle].id < id) lo = middle + 1;
        else hi = middle;
    }
    return lo < specials.count && specials.list[lo].id == id ? specials.list + lo : nullptr;
}

// The score of an id with this raw logit, mask and entry; each operation rounds, as in the twin.
__device__ __forceinline__ double score_with(const Logits& row, int id, float raw, unsigned int mask,
                                             const Special* special, const Request& r) {
    if (mask & 1 || denied(row, id) || ((mask & 2 || (special && special->stop)) && r.index < r.min_tokens))
        return -(double)kInfinity;
    const double s = special ? __dadd_rn((double)raw, special->bias) : (double)raw;
    const int count = r.penalized ? row.counts[id] : 0;
    if (!count) return s;
    const double repeated = s > 0 ? __ddiv_rn(s, r.repetition) : __dmul_rn(s, r.repetition);
    return __dadd_rn(__dadd_rn(repeated, -__dmul_rn((double)count, r.frequency)), -r.presence);
}

// The score of an id with this raw logit and mark.
__device__ __forceinline__ double adjusted(const Logits& row, int id, float raw, unsigned int marked,
                                           const Request& r) {
    return score_with(row, id, raw, marked ? row.mask[id] : 0, marked ? find(row.specials, id) : nullptr, r);
}

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
    const bool first = a.score > b.score || (a.score == b.score && a.id <= b.id);
    return {first ? a.score : b.score, fmax(a.raw, b.raw), first ? a.id : b.id, a.broken | b.broken};
}

// The best over the block's threads, returned to every thread.
__device__ __noinline__ Best best_of(Best mine) {
    __shared__ Best warps[THREADS / 32];
    for (int lane = 16; lane; lane /= 2) {
        const Best other = {
            __shfl_xor_sync(0xffffffffu, mine.score, lane), __shfl_xor_sync(0xffffffffu, mine.raw, lane),
            __shfl_xor_sync(0xffffffffu, mine.id, lane), __shfl_xor_sync(0xffffffffu, mine.broken, lane)};
        mine = better(mine, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    Best all = warps[0];
    for (int w = 1; w < THREADS / 32; ++w) all = better(all, warps[w]);
    return all;
}

// Make the drawn token the next step's input; id -1: no token could be drawn. The slot becomes
// inactive after an end id, at its limit and if no token could be drawn.
__device__ __forceinline__ void commit(const Sequence& sequence, int id, int& drawn_id) {
    drawn_id = sequence.drawn->id = id;
    const SequenceEnd& end = *sequence.end;
    const int position = end.position + 1;
    bool ended = id < 0 || position >= end.limit;
#pragma unroll
    for (int i = 0; i < ENDS / 4; ++i) {
        const int4 e = end.ends[i];
        ended |= e.x == id || e.y == id || e.z == id || e.w == id;
    }
    *sequence.position = ended ? -1 : position;
    if (id < 0) return;
    *sequence.token = id;
    sequence.request->index = end.index + 1;
    if (end.penalized) sequence.counts[id] += 1;
}
