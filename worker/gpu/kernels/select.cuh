// Top-k and top-p of one row without sorting the vocabulary.
//
// The order of ids: descending value, then ascending id. A selection is the shortest prefix of it
// that has `target` ids, or whose masses reach `target`. A histogram of 2^10 intervals of values finds
// the one in which it ends. While that holds too many ids, a histogram of its 2^10 parts follows: of
// keys (ordered_key), and of ids once all keys are equal. The rest is listed, and the last block to
// arrive ends the selection in its list: alike in shared memory, then by counting for each of at most
// THREADS ids those before it.
// Counts and masses are integers, so no order of additions matters.
// Twin: `_largest` and `_nucleus` in worker/cpu/sampler.py.
#pragma once
#include "interval.cuh"

struct RowScratch {
    union {
        Histogram histogram;
        int list[kListed];
        u64 sums[kBuckets];
    };
    u64 keys[THREADS], masses[THREADS];
    int ids[THREADS];
    u64 warps[32];
    Scale scale;
    Interval interval;
    Place last;  // of the selection
    u64 mass;    // of the selection
    int listed, first;
};

// Add to a sum in shared memory, which has atomics of 32 bits only.
__device__ __forceinline__ void add_shared(u64* sum, u64 v) {
    unsigned int* const halves = reinterpret_cast<unsigned int*>(sum);
    const unsigned int low = (unsigned int)v, carry = atomicAdd(halves, low) + low < low;
    const unsigned int high = (unsigned int)(v >> 32) + carry;
    if (high) atomicAdd(halves + 1, high);
}

// exp((score - peak) / temperature) in units of 2^-44. Below exp(-32) that rounds to 0.
__device__ __forceinline__ u64 weight_of(const RowTask& task, double score) {
    const double temperature = task.request.temperature, d = fmax(score - task.peak, -33.0 * temperature);
    // The rounded quotient d / temperature by Newton's method (Markstein 1990), without a branch.
    double q = d * task.inverse;
#pragma unroll
    for (int i = 0; i < 2; ++i) q = fma(fma(-q, temperature, d), task.inverse, q);
    return (u64)__double2ll_rn(exp(q) * kOne);
}

// The least mass of the nucleus of ids of this mass.
__device__ __forceinline__ u64 top_p_of(const RowTask& task, u64 mass) {
    return max(1ull, min(mass, (u64)ceil(task.request.top_p * (double)mass)));
}

__device__ __forceinline__ u64 above_min_p(const RowTask& task, u64 weight) {
    return (double)weight < task.min_weight ? 0 : weight;
}

__device__ __forceinline__ bool weightless(const RowTask& task, double score) {
    return score - task.peak < -32.0 * task.request.temperature;
}

// Selects from scores, with weights as masses, or with RAW from raw logits.
template <bool RAW>
struct Selection {
    RowTask& task;
    RowScratch& scratch;
    const bool by_mass, with_mass;

    // Call visit(id, value, weight) for the ids of the block's share; the weights only if `weighted`.
    template <typename Visit>
    __device__ __forceinline__ void for_each_in_share(bool weighted, Visit visit) const {
        for_each_quad(task, [&](const Quad& q) {
            double values[4];
            u64 weights[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < 4; ++e)
                values[e] = e < q.count ? value_of(q.id + e, q.raw[e], q.marks() >> e & 1) : -(double)kInfinity;
            if (weighted) {
#pragma unroll
                for (int e = 0; e < 4; ++e) weights[e] = weight_of(task, values[e]);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (e < q.count) visit(q.id + e, values[e], weights[e]);
        });
    }

    // The same for the first `n` ids of the board's list.
    template <typename Visit>
    __device__ __forceinline__ void for_each_listed(int n, bool weighted, Visit visit) const {
        const Logits& row = task.row;
        __builtin_assume(__isGlobal(row.raw) && __isGlobal(row.marks));
        for (int i = threadIdx.x; i < n; i += THREADS) {
            const int id = task.board->list[i];
            const double value = value_of(id, row.raw[id], row.marks[id >> 5] >> (id & 31) & 1);
            visit(id, value, weighted ? weight_of(task, value) : 0);
        }
    }

    __device__ __forceinline__ double value_of(int id, float raw, unsigned int mark) const {
        return RAW ? (double)raw : score_of(task, id, raw, mark);
    }

    // -1: before the interval, 0: in it, 1: behind it, or weightless.
    __device__ __forceinline__ int side(const Interval& in, double value, int id) const {
        if (!RAW && weightless(task, value)) return 1;
        if (in.bucket < 0) return 0;
        const int bucket = scratch.scale(value);
        if (bucket != in.bucket) return bucket < in.bucket ? -1 : 1;
        const u64 key = ordered_key(value);
        if (key > in.high) return -1;
        if (key < in.low) return 1;
        if (in.low < in.high || (in.first <= id && id < in.end)) return 0;
        return id < in.first ? -1 : 1;
    }

    // The part of the interval that holds an id of the interval.
    __device__ __forceinline__ int part_of(const Interval& in, double value, int id) const {
        if (in.bucket < 0) return scratch.scale(value);
        return in.low < in.high ? (int)((in.high - ordered_key(value)) >> in.shift()) : (id - in.first) >> in.shift();
    }

    __device__ __forceinline__ void count_part(const Interval& in, int id, double value, u64 weight) const {
        if (side(in, value, id)) return;
        const int part = part_of(in, value, id);
        atomicAdd(&scratch.histogram.count[part], 1u);
        if (weight) add_shared(&scratch.histogram.mass[part], weight);
    }

    // Add the ids of the share that are in the interval to the histogram of its parts, over the row.
    __device__ void count_parts(Histogram* sum) const {
        Histogram& own = scratch.histogram;
        const Interval& in = scratch.interval;
        __builtin_assume(__isGlobal(sum));
        clear(own);
        __syncthreads();
        for_each_in_share(with_mass, [&](int id, double v, u64 weight) { count_part(in, id, v, weight); });
        __syncthreads();
        for (int b = threadIdx.x; b < kBuckets; b += THREADS) {
            if (own.count[b]) atomicAdd(&sum->count[b], own.count[b]);
            if (own.mass[b]) atomicAdd(&sum->mass[b], own.mass[b]);
        }
    }

    // Replace the interval by the part in which the selection ends.
    __device__ void choose_part(const Histogram& sum) const {
        const Interval in = scratch.interval;
        u64 counts[4], masses[4], count = 0, mass = 0, all, all_mass = 0, above_mass = 0;
        const int begin = 4 * threadIdx.x;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            count += counts[b] = sum.count[begin + b];
            mass += masses[b] = with_mass ? sum.mass[begin + b] : 0;
        }
        u64 above = in.above + block_scan(count, scratch.warps, all);
        if (with_mass) above_mass = in.above_mass + block_scan(mass, scratch.warps, all_mass);
        const u64 target = !by_mass ? min(in.target, in.above + all) : in.target ? in.target : top_p_of(task, all_mass);
        for (int b = 0; b < 4; ++b) {
            const u64 before = by_mass ? above_mass : above, with = before + (by_mass ? masses[b] : counts[b]);
            if (before < target && target <= with)
                scratch.interval = in.part(begin + b, scratch.scale, target, above, above_mass, counts[b], task.row.size);
            above += counts[b], above_mass += masses[b];
        }
        __syncthreads();
    }

    // Whether all ids up to the interval's end fit in a list that is ended by counting.
    __device__ bool complete() const { return scratch.interval.above + scratch.interval.count <= THREADS; }

    // Find an interval whose ids can be listed. A target of few ids needs a complete list.
    __device__ void run(u64 target, double top, double range) const {
        RowBoard* const board = task.board;
        if (threadIdx.x == 0) {
            scratch.scale = Scale(top, range);
            scratch.interval = {target, 0, 0, 0, -1, 0, 0, 0, 0};
        }
        const bool few = !by_mass && target <= THREADS / 2;
        do {
            Histogram* const sum = board->histograms + task.levels % 2;
            __syncthreads();
            count_parts(sum);
            meet(task, [&] {
                if (task.levels) clear(board->histograms[(task.levels + 1) % 2]);
            });
            if (threadIdx.x == 0) ++task.levels;
            choose_part(*sum);
        } while (!complete() && (few || scratch.interval.count > kListed));
    }

    // Put the ids of the interval on the board's list, with `whole` also those before it. Otherwise
    // sum up the weights of those before it.
    __device__ void list(bool whole) const {
        RowBoard* const board = task.board;
        const Interval& in = scratch.interval;
        if (threadIdx.x == 0) scratch.listed = 0;
        __syncthreads();
        u64 sum = 0;
        for_each_in_share(!whole, [&](int id, double v, u64 weight) {
            const int at = side(in, v, id);
            if (at > 0) return;
            if (at == 0 || whole) scratch.list[atomicAdd(&scratch.listed, 1)] = id;
            else sum += above_min_p(task, weight);
        });
        for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        if (threadIdx.x % 32 == 0) board->sums[task.share * kWarps + threadIdx.x / 32] = sum;
        __syncthreads();
        const int own = scratch.listed;
        if (!own) return;
        if (threadIdx.x == 0) scratch.first = atomicAdd(&board->listed, own);
        __syncthreads();
        for (int i = threadIdx.x; i < own; i += THREADS) board->list[scratch.first + i] = scratch.list[i];
    }

    // The rank of thread t's id among the first `n` of the list.
    struct Rank {
        int id;
        u64 count, mass, weight;  // of the ids before it; its own
        bool kept;
    };

    // End the selection in the board's list, by one block. If the list is not whole, scratch.last and
    // scratch.mass are the selection's last place and mass.
    __device__ Rank end_in_list(bool whole) const {
        const int n = (int)(scratch.interval.count + (whole ? scratch.interval.above : 0)), t = threadIdx.x;
        while (!whole && scratch.interval.count > THREADS) {
            const Interval in = scratch.interval;
            clear(scratch.histogram);
            __syncthreads();
            for_each_listed(n, with_mass, [&](int id, double v, u64 weight) { count_part(in, id, v, weight); });
            __syncthreads();
            choose_part(scratch.histogram);
        }
        const Interval in = scratch.interval;
        if (t == 0) scratch.listed = 0;
        __syncthreads();
        for_each_listed(n, !RAW, [&](int id, double v, u64 weight) {
            if (!whole && side(in, v, id)) return;
            const int at = atomicAdd(&scratch.listed, 1);
            scratch.keys[at] = ordered_key(v), scratch.ids[at] = id, scratch.masses[at] = weight;
        });
        __syncthreads();
        const int listed = scratch.listed;
        Rank mine = {-1, whole ? 0 : in.above, whole ? 0 : in.above_mass, 0, false};
        if (t < listed) {
            const Place place = {scratch.keys[t], scratch.ids[t]};
            mine.id = place.id, mine.weight = scratch.masses[t];
            for (int i = 0; i < listed; ++i)
                if (Place{scratch.keys[i], scratch.ids[i]}.before(place)) ++mine.count, mine.mass += scratch.masses[i];
            mine.kept = by_mass ? mine.mass < in.target : mine.count < in.target;
            const bool last = by_mass ? in.target <= mine.mass + mine.weight : mine.count + 1 == in.target;
            if (mine.kept && last) scratch.last = place, scratch.mass = mine.mass + mine.weight;
        }
        __syncthreads();
        return mine;
    }
};
