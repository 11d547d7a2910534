// The blocks of one row of sample.cu: their shares of the vocabulary, their meeting point and the
// memory in which they exchange results.
//
// A block takes a ticket when it starts and thus its row and share: all blocks of lower tickets have
// started, so a row's blocks never wait for one that cannot start, however few fit on the device.
// Twin: worker/cpu/sampler.py.
#pragma once
#include "sampling.cuh"

constexpr int kBuckets = 1024, kBucketBits = 10, kListed = 2048, kWarps = THREADS / 32;
static_assert(kBuckets == 4 * THREADS && kBuckets == LOGPROB_SLICES * kWarps, "four of each a thread");

struct Histogram {
    u64 mass[kBuckets];
    unsigned int count[kBuckets];
};

__device__ __forceinline__ void clear(Histogram& histogram) {
    for (int b = threadIdx.x; b < kBuckets; b += THREADS) histogram.count[b] = 0, histogram.mass[b] = 0;
}

struct RowBoard {  // device memory, zeros before the first launch
    Barrier barrier;
    unsigned int draws;  // arrivals at the end of the draw, after which blocks may go on to the next meeting
    int id, listed, unused;
    u64 target;
    Best bests[LOGPROB_SLICES];          // of the shares
    double slice_sums[LOGPROB_SLICES];
    u64 sums[LOGPROB_SLICES * kWarps];   // weights of each warp's ids that are kept and not listed
    Histogram histograms[2];
    int list[kListed];
};
static_assert(sizeof(RowBoard) == ROW_BOARD_BYTES, "ROW_BOARD of worker/gpu/sampler.py");

// What a block's threads read while they compute, in shared memory.
struct RowTask {
    Logits row;
    Request request;
    SequenceEnd end;
    Sequence sequence;
    RowBoard* board;
    int share, shares, lo, hi;  // this block computes ids [lo, hi); lo is a multiple of 4 if lo < hi
    int each;                   // ids of a warp: a multiple of 4; warp w begins at lo + w * each
    int penalized;
    unsigned int generation;  // of the barrier
    int levels;               // histograms added up so far in this launch
    double peak, raw_best, inverse, min_weight;  // inverse: 1 / temperature
};

// Wait for all blocks of the row. The last one to arrive runs `last` before the others go on.
template <typename Last>
__device__ __forceinline__ void meet(RowTask& task, Last last) {
    Barrier* const barrier = &task.board->barrier;
    if (arrives_last(&barrier->arrived, task.shares)) {
        last();
        __syncthreads();
        if (threadIdx.x == 0) store_release(&barrier->generation, ++task.generation);
    } else if (threadIdx.x == 0) {
        const unsigned int before = task.generation++;
        while (load_acquire(&barrier->generation) == before) {
        }
    }
    __syncthreads();
}

// The raw logits and marks of ids id … id + 3, as far as they are below `hi`.
struct Quad {
    float raw[4];
    unsigned int word;  // of the marks; shifted when it is used, so that a load does not wait for it
    int id, count;
    __device__ unsigned int marks() const { return word >> (id & 31) & 15; }
};

__device__ __forceinline__ Quad load_quad(const Logits& row, int id, int hi) {
    Quad q = {{0, 0, 0, 0}, 0, id, min(4, hi - id)};
    if (q.count <= 0) return q;
    // Pointers read from shared memory have no known address space: loads would be generic.
    __builtin_assume(__isGlobal(row.raw) && __isGlobal(row.marks));
    q.word = row.marks[id >> 5];
    if (q.count == 4 && ((size_t)row.raw & 15) == 0) {
        const float4 v = *reinterpret_cast<const float4*>(row.raw + id);
        q.raw[0] = v.x, q.raw[1] = v.y, q.raw[2] = v.z, q.raw[3] = v.w;
    } else {
        for (int e = 0; e < 4; ++e)
            if (e < q.count) q.raw[e] = row.raw[id + e];
    }
    return q;
}

// Call visit(quad) for the ids of this warp's part of the share; the next quad loads meanwhile.
template <typename Visit>
__device__ __forceinline__ void for_each_quad(const RowTask& task, Visit visit) {
    const int from = task.lo + (int)threadIdx.x / 32 * task.each, to = min(task.hi, from + task.each);
    int id = from + 4 * ((int)threadIdx.x % 32);
    Quad next = load_quad(task.row, id, to);
    for (; id < to; id += 128) {
        const Quad q = next;
        next = load_quad(task.row, id + 128, to);
        visit(q);
    }
}

__device__ __noinline__ double slow_score(const RowTask* task, int id, float raw, unsigned int mark) {
    return adjusted(task->row, id, raw, mark, task->request);
}

__device__ __forceinline__ double score_of(const RowTask& task, int id, float raw, unsigned int mark) {
    if (denied(task.row, id)) return -(double)kInfinity;
    return mark || task.penalized ? slow_score(&task, id, raw, mark) : (double)raw;
}

// The best of the block's share. Only marked ids and penalized rows need f64.
__device__ __forceinline__ Best best_of_share(const RowTask& task) {
    constexpr int kAtOnce = 4;
    const Logits& row = task.row;
    const int lo = task.lo + 4 * threadIdx.x, hi = task.hi;
    const bool penalized = task.penalized;
    Best slow = {-(double)kInfinity, -(double)kInfinity, row.size, 0};
    float best = -kInfinity, highest = -kInfinity;
    int best_id = row.size, broken = 0;
    for (int from = lo; from < hi; from += kAtOnce * 4 * THREADS) {
        Quad quads[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) quads[i] = load_quad(row, from + i * 4 * THREADS, hi);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const Quad& q = quads[i];
            const int id = from + i * 4 * THREADS;
            if (id + 4 <= hi && !q.marks() && !penalized) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    highest = fmaxf(highest, q.raw[e]);
                    if (denied(row, id + e)) continue;
                    broken |= q.raw[e] != q.raw[e];
                    if (q.raw[e] > best) best = q.raw[e], best_id = id + e;
                }
                continue;
            }
#pragma unroll 1
            for (int e = 0; e < min(4, hi - id); ++e) {
                const float raw = row.raw[id + e];
                const double s = score_of(task, id + e, raw, q.marks() >> e & 1);
                highest = fmaxf(highest, raw);
                slow = better(slow, {s, -(double)kInfinity, id + e, s != s});
            }
        }
    }
    return best_of(better(slow, {(double)best, (double)highest, best_id, broken}));
}
