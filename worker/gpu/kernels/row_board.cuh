// The blocks of one row of sample_rows.cu: their shares of the vocabulary, their meeting point and
// the memory in which they exchange results.
//
// A block takes a ticket when it starts and thus its row and share: all blocks of lower tickets have
// started, so a row's blocks never wait for one that cannot start, however few fit on the device.
// Twin: worker/cpu/sampler.py.
#pragma once
#include "sampling.cuh"

constexpr int kBuckets = 1024, kBucketBits = 10, kLevels = 3, kListed = 2048;

struct Histogram {
    u64 mass[kBuckets];
    unsigned int count[kBuckets];
};

__device__ __forceinline__ void clear(Histogram& histogram) {
    for (int b = threadIdx.x; b < kBuckets; b += THREADS) histogram.count[b] = 0, histogram.mass[b] = 0;
}

struct ShareResult {  // of one block; each field is read after a meeting of its own
    Best best;
    u64 kept, ties, low, high, count, mass;
};

// The interval of scores that contains the end of a selection: `count` ids, after `above` ids of
// total mass `above_mass`, which are higher.
struct Interval {
    u64 target, above, above_mass, count, low, high, middle;
    unsigned int prefix;
    int shift, reached;
};

struct RowBoard {  // device memory, zeros before the first launch
    Barrier barrier;
    int id, listed, top_listed, top[TOP];
    Best best;
    Interval interval;
    Cutoff cut;
    ShareResult shares[LOGPROB_SLICES];
    double slice_sums[LOGPROB_SLICES];
    Histogram weights, other;
    u64 keys[kListed];
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
    int penalized;
    double peak, min_weight;
    Cutoff cut;
};

// Wait for all blocks of the row. The last one to arrive runs `last` before the others go on.
template <typename Last>
__device__ __forceinline__ void meet(const RowTask& task, Last last) {
    __shared__ unsigned int generation;
    __shared__ bool is_last;
    Barrier* const barrier = &task.board->barrier;
    __syncthreads();
    if (threadIdx.x == 0) {
        generation = load_acquire(&barrier->generation);
        is_last = task.shares == 1 || arrive(&barrier->arrived, task.shares - 1) == task.shares - 1;
    }
    __syncthreads();
    if (is_last) {
        last();
        __syncthreads();
        if (threadIdx.x == 0) store_release(&barrier->generation, generation + 1);
    } else if (threadIdx.x == 0) {
        while (load_acquire(&barrier->generation) == generation) {
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

// Call visit(id, raw, mark) for each id of the block's share; the next quad loads meanwhile.
template <typename Visit>
__device__ __forceinline__ void for_each_id(const RowTask& task, Visit visit) {
    int id = task.lo + 4 * threadIdx.x;
    Quad next = load_quad(task.row, id, task.hi);
    for (; id < task.hi; id += 4 * THREADS) {
        const Quad q = next;
        next = load_quad(task.row, id + 4 * THREADS, task.hi);
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (e < q.count) visit(id + e, q.raw[e], q.marks() >> e & 1);
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

// The ids of a warp, in tiles of consecutive ids; lane j owns tile j, so thread order is id order.
struct Tiles {
    int lo, hi, size;
    __device__ Tiles(const RowTask& task) {
        const int warps = THREADS / 32, steps = (task.hi - task.lo + 127) / 128;  // of 128 ids
        const int each = (steps + warps - 1) / warps;
        lo = min(task.hi, task.lo + (int)threadIdx.x / 32 * each * 128), hi = min(task.hi, lo + each * 128);
        size = (each + 31) / 32 * 128;
    }
};

__device__ __forceinline__ u64 warp_total(u64 v) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

// Return the sum of each(j, quad) over tile j of this lane. `each` is called by whole warps.
template <typename Each>
__device__ __forceinline__ u64 sum_by_tile(const RowTask& task, const Tiles& tiles, Each each) {
    const int lane = threadIdx.x % 32;
    u64 own = 0, sum = 0;
    Quad next = load_quad(task.row, tiles.lo + 4 * lane, tiles.hi);
    for (int at = tiles.lo, tile = 0; at < tiles.hi; at += 128) {
        const Quad q = next;
        next = load_quad(task.row, at + 128 + 4 * lane, tiles.hi);
        sum += each(tile, q);
        if ((at + 128 - tiles.lo) % tiles.size && at + 128 < tiles.hi) continue;
        sum = warp_total(sum);
        if (lane == tile) own = sum;
        sum = 0, ++tile;
    }
    return own;
}

// The sum over the row of a field of the shares, and over the shares before this one.
__device__ __forceinline__ u64 over_shares(const RowTask& task, u64 ShareResult::*field, u64* warps, u64& total) {
    const int t = threadIdx.x;
    const u64 mine = t < task.shares ? task.board->shares[t].*field : 0;
    u64 before;
    block_scan(t < task.share ? mine : 0, warps, before);
    block_scan(mine, warps, total);
    return before;
}
