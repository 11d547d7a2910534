// The blocks of one row of sample.cu: their shares of the vocabulary, their barrier and the
// memory in which they exchange results.
//
// In a launch of several rows a block takes a ticket when it starts, and thus its row and share:
// all blocks of lower tickets have started, so at most one row waits for blocks that have not. All
// blocks of one row must fit on the device.
// Twin: worker/cpu/sampler.py.
#pragma once
#include "sampling.cuh"

constexpr int kBuckets = 1024, kBucketBits = 10, kListed = 1024, kWarps = THREADS / 32;
static_assert(kBuckets == 4 * THREADS && kBuckets == LOGPROB_SLICES * kWarps, "four of each a thread");

struct Histogram {
    u64 mass[kBuckets];
    unsigned int count[kBuckets];
};

__device__ __forceinline__ void clear(Histogram& histogram) {
#pragma unroll
    for (int i = 0; i < kBuckets; i += THREADS) histogram.count[i + threadIdx.x] = 0, histogram.mass[i + threadIdx.x] = 0;
}

struct List {  // ids among which a selection ends
    u64 keys[kListed], weights[kListed];
    int ids[kListed];
};

struct RowExchange {  // device memory, zeros before the first launch
    unsigned int arrived;       // arrivals at the barriers of this launch; zero after it
    unsigned int drawn, ended;  // arrivals at the end of the draw and of the launch
    int id, listed, unused;
    u64 target;
    Best bests[LOGPROB_SLICES];          // of the shares
    double slice_sums[LOGPROB_SLICES];
    u64 sums[LOGPROB_SLICES * kWarps];   // weights of each warp's ids that are kept and not listed
    Histogram histograms[2];
    List list;
};
static_assert(sizeof(RowExchange) == ROW_EXCHANGE_BYTES, "ROW_EXCHANGE of worker/gpu/sampler.py");

// What a block's threads read while they compute.
struct RowTask {
    Logits row;
    Request request;
    SequenceEnd end;
    Sequence sequence;
    RowExchange* exchange;
    int share, shares, lo, hi;  // this block computes ids [lo, hi); lo is a multiple of 32 if lo < hi
    int each;                   // ids of a warp: a multiple of 32; warp w begins at lo + w * each
    int penalized;
    unsigned int arrived;     // arrivals up to the end of the last barrier
    unsigned int random;      // 24 bits
    int levels;               // histograms added up so far in this launch
    double temperature, inverse, min_weight;  // inverse: 1 / temperature
    double peak, raw_best;
};

// One object a block, not a parameter: functions that are not inlined would address it by a
// pointer.
__shared__ RowTask task;

__device__ __forceinline__ void wait_for_arrivals() {
    while (load_acquire(&task.exchange->arrived) < task.arrived) {
    }
}

// Wait for all blocks of the row.
__device__ __forceinline__ void row_barrier() {
    __syncthreads();
    if (threadIdx.x == 0) {
        task.arrived += task.shares;
        add_release(&task.exchange->arrived, 1);
        wait_for_arrivals();
    }
    __syncthreads();
}

// Whether this block is the last of the row to arrive. The others wait until it calls open_barrier.
__device__ __forceinline__ bool is_last_at_barrier() {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        task.arrived += task.shares + 1;  // open_barrier is an arrival too
        last = arrive(&task.exchange->arrived, ~0u) == task.arrived - 2;
        if (!last) wait_for_arrivals();
    }
    __syncthreads();
    return last;
}

__device__ __forceinline__ void open_barrier() {
    __syncthreads();
    if (threadIdx.x == 0) add_release(&task.exchange->arrived, 1);
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

__device__ __noinline__ double slow_score(int id, float raw, unsigned int mark) {
    return adjusted(task.row, id, raw, mark, task.request);
}

__device__ __forceinline__ double score_of(int id, float raw, unsigned int mark) {
    if (denied(task.row, id)) return -(double)kInfinity;
    return mark || task.penalized ? slow_score(id, raw, mark) : (double)raw;
}

// The best of the block's share. Only marked ids and penalized rows need f64.
__device__ __forceinline__ Best best_of_share() {
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
                const double s = score_of(id + e, raw, q.marks() >> e & 1);
                highest = fmaxf(highest, raw);
                slow = better(slow, {s, -(double)kInfinity, id + e, s != s});
            }
        }
    }
    return best_of(better(slow, {(double)best, (double)highest, best_id, broken}));
}
