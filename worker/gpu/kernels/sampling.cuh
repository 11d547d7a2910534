// What the sampler's phases in sample.cu share: a row's request and result, what blocks tell each other, adjusted scores.
//
// Request and Drawn are packed and read by worker/gpu/state.py and sampler.py. Twin: worker/cpu/sampler.py and philox.py.
#pragma once
#include "select.cuh"
#include "warp.cuh"

constexpr int kThreads = 256, kTop = 20;
constexpr double kOne = 17592186044416.0;  // 2^44: a vocabulary of a million equal tokens still fits 64 bits

struct Request {
    double temperature, top_p, min_p, repetition, frequency, presence;
    u64 seed;
    int index, min_tokens, top_k, logprobs, forced, penalized, biased, unused;
};
static_assert(sizeof(Request) == 88, "worker/gpu/state.py packs it");

struct Drawn {
    int id, count;
    double logprob;
    double top_logprobs[kTop];
    int top_ids[kTop];
};
static_assert(sizeof(Drawn) == 256, "worker/gpu/sampler.py reads it");

struct Best {  // of some ids: the highest score and its lowest id, the highest raw logit, whether a score is no number
    double score, raw;
    int id, broken;
};

struct Slice {  // what a block tells the others, each field before a barrier of its own
    Best best;
    double raw_sum;
    u64 mass, kept, ties;
};

struct Board {  // device memory, zeros before the first launch; its size stands in worker/gpu/sampler.py
    Barrier barrier;
    int id, listed, list[kTop];
    Slice slices[kThreads];
    Bin histograms[3][kRounds][kBins];
};
static_assert(sizeof(Board) == 112736, "worker/gpu/sampler.py reserves it");

struct Logits {  // one row, and what is known of its ids
    const float* raw;
    const unsigned char* mask;
    const int* counts;
    const double* bias;
    int size;
};

struct Slot {  // the sequence's state, which the drawn token moves on
    int *token, *position, *counts;
    Request* request;
    Drawn* drawn;
};

__device__ __forceinline__ unsigned int philox_word(u64 seed, unsigned int index) {
    unsigned int c0 = index, c1 = 0, c2 = 0, c3 = 0, k0 = (unsigned int)seed, k1 = (unsigned int)(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const unsigned int h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        const unsigned int h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    }
    return c0;
}

// The score of an id with this raw logit and mask. Operations one by one, as the twin rounds them.
__device__ __forceinline__ double adjusted(const Logits& row, int id, float raw, unsigned int mask, const Request& r) {
    if (mask & 1 || (mask & 2 && r.index < r.min_tokens)) return -(double)kInfinity;
    if (!r.biased && !r.penalized) return raw;
    const double s = __dadd_rn((double)raw, r.biased ? row.bias[id] : 0.0);
    const int count = r.penalized ? row.counts[id] : 0;
    if (!count) return s;
    const double repeated = s > 0 ? __ddiv_rn(s, r.repetition) : __dmul_rn(s, r.repetition);
    return __dadd_rn(__dadd_rn(repeated, -__dmul_rn((double)count, r.frequency)), -r.presence);
}

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
    const bool first = a.score > b.score || (a.score == b.score && a.id <= b.id);
    return {first ? a.score : b.score, fmax(a.raw, b.raw), first ? a.id : b.id, a.broken | b.broken};
}

// The best over the block's threads, to every thread.
__device__ __forceinline__ Best best_of(Best mine) {
    __shared__ Best warps[kThreads / 32];
    for (int lane = 16; lane; lane /= 2) {
        mine = better(mine, {__shfl_xor_sync(0xffffffffu, mine.score, lane), __shfl_xor_sync(0xffffffffu, mine.raw, lane),
                             __shfl_xor_sync(0xffffffffu, mine.id, lane), __shfl_xor_sync(0xffffffffu, mine.broken, lane)});
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    Best all = warps[0];
    for (int w = 1; w < kThreads / 32; ++w) all = better(all, warps[w]);
    return all;
}

// The best of ids [lo, hi), whose scores are stored for a draw. kAtOnce ids a thread are on their way together.
__device__ __forceinline__ Best best_in(const Logits& row, const Request& r, double* scores, int lo, int hi) {
    constexpr int kAtOnce = 8;
    Best mine = {-(double)kInfinity, -(double)kInfinity, row.size, 0};
    for (int from = lo + threadIdx.x; from < hi; from += kAtOnce * kThreads) {
        float raw[kAtOnce];
        unsigned int mask[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int id = from + i * kThreads;
            if (id < hi) raw[i] = row.raw[id], mask[i] = row.mask[id];
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int id = from + i * kThreads;
            if (id >= hi) break;
            const double s = adjusted(row, id, raw[i], mask[i], r);
            if (r.temperature > 0) scores[id] = s;
            mine = better(mine, {s, (double)raw[i], id, s != s});
        }
    }
    return best_of(mine);
}

// Elements [begin, end) of this thread: neighbours, so that thread order is id order.
struct Chunk {
    int begin, end;
    __device__ Chunk(int lo, int hi) {
        const int each = (hi - lo + kThreads - 1) / kThreads;
        begin = min(hi, lo + (int)threadIdx.x * each), end = min(hi, begin + each);
    }
};

// Calls visit(i) for each element of the head in this thread's chunk. Where the head ends among equal keys, the blocks
// first tell each other how many they have: one barrier.
template <typename KeyOf, typename Visit>
__device__ void for_each_kept(const Cutoff& cut, const Chunk chunk, KeyOf key_of, Board* board, u64* warps, Visit visit) {
    u64 rank = 0;
    if (cut.ties) {
        u64 ties = 0, all;
        for (int i = chunk.begin; i < chunk.end; ++i) ties += key_of(i) == cut.key;
        rank = block_scan(ties, warps, all);
        if (threadIdx.x == 0) board->slices[blockIdx.x].ties = all;
        grid_barrier(&board->barrier);
        u64 of_lower;
        block_scan(threadIdx.x < blockIdx.x ? board->slices[threadIdx.x].ties : 0, warps, of_lower);
        rank += of_lower;
    }
    for (int i = chunk.begin; i < chunk.end; ++i) {
        const u64 key = key_of(i);
        if (key > cut.key || (key == cut.key && rank++ < cut.ties)) visit(i);
    }
}

// The drawn token becomes the next step's input; -1 says that none could be drawn.
__device__ void commit(const Slot& slot, int id, Board* board) {
    board->id = slot.drawn->id = id;
    if (id < 0) return;
    *slot.token = id;
    *slot.position += 1;
    if (slot.request->penalized) slot.counts[id] += 1;
    slot.request->index += 1;
}
