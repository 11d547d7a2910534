// Top-k and top-p of one row without sorting the vocabulary.
//
// The order of ids: descending value, then ascending id. A selection is the shortest prefix of it
// that has `target` ids, or whose masses reach `target`. A histogram of 2^10 intervals of values
// finds the one in which it ends. While that holds too many ids, a histogram of its 2^10 parts
// follows: of keys (ordered_key), and of ids once all keys are equal. The rest is listed, and the
// last block to arrive ends the selection in its list: alike in shared memory, then by counting for
// each of at most THREADS ids those before it.
// Counts and masses are integers, so no order of additions matters.
//
// A decode step runs the kernel once, and its weights evict the instructions from the caches: hence
// one function for all passes over the ids, and few functions that are inlined more than once.
// Twin: `_largest` and `_nucleus` in worker/cpu/sampler.py.
#pragma once
#include "interval.cuh"

constexpr int kRanked = 64;  // ids of an interval that are ranked without a further histogram

struct RowScratch {
    union {
        List list;  // of the block
        struct {
            Histogram histogram;
            u64 sums[kBuckets];  // kept weights by warp of the row
        };
    };
    Place places[THREADS];
    u64 masses[THREADS];
    Scale scale;
    Interval interval;
    Place last;  // of the selection
    u64 mass;    // of the selection
    int listed, first;
};

__shared__ RowScratch scratch;

// Add to a sum in shared memory, which has atomics of 32 bits only.
__device__ __forceinline__ void add_shared(u64* sum, u64 v) {
    unsigned int* const halves = reinterpret_cast<unsigned int*>(sum);
    const unsigned int low = (unsigned int)v, carry = atomicAdd(halves, low) + low < low;
    const unsigned int high = (unsigned int)(v >> 32) + carry;
    if (high) atomicAdd(halves + 1, high);
}

// exp((score - peak) / temperature) in units of 2^-44. Below exp(-32) that rounds to 0.
__device__ __forceinline__ u64 weight_of(double score) {
    const double temperature = task.temperature, d = fmax(score - task.peak, -33.0 * temperature);
    // The rounded quotient d / temperature by Newton's method (Markstein 1990), without a branch.
    double q = d * task.inverse;
#pragma unroll
    for (int i = 0; i < 2; ++i) q = fma(fma(-q, temperature, d), task.inverse, q);
    return (u64)__double2ll_rn(exp(q) * kOne);
}

// The least mass of the nucleus of ids of this mass.
__device__ __forceinline__ u64 top_p_of(u64 mass) {
    return max(1ull, min(mass, (u64)ceil(task.request.top_p * (double)mass)));
}

__device__ __forceinline__ u64 above_min_p(u64 weight) { return (double)weight < task.min_weight ? 0 : weight; }

__device__ __forceinline__ void count_part(int part, u64 weight) {
    atomicAdd(&scratch.histogram.count[part], 1u);
    if (weight) add_shared(&scratch.histogram.mass[part], weight);
}

// What is selected: from raw logits or from scores, which have weights as masses; up to a mass or a
// number of ids. Without `with_mass` no masses are added up until the ids are listed.
struct Selection {
    bool raw, by_mass, with_mass;
};

enum Visit {
    kCount,      // add the interval's ids to scratch.histogram, by part
    kListSome,   // list the interval's ids; the sum of the weights of those before it is returned
    kListWhole,  // list all ids up to the interval's end
};

// One pass over the ids of this warp's part of the share. The loop is not unrolled: one row has
// five ids a thread, and fetching the instructions of five takes longer than executing those of one
// five times.
__device__ __noinline__ u64 visit_share(Selection selection, Visit visit) {
    const int lane = threadIdx.x % 32, begin = task.lo + (int)threadIdx.x / 32 * task.each;
    const int to = min(task.hi, begin + task.each);
    const float* const raws = task.row.raw;
    const unsigned int* const marks = task.row.marks;
    // Pointers read from shared memory have no known address space: loads would be generic.
    __builtin_assume(__isGlobal(raws) && __isGlobal(marks));
    const Interval in = scratch.interval;
    const Scale scale = scratch.scale;
    const double least = selection.raw ? -(double)kInfinity : -32.0 * task.temperature;  // below it: no weight
    u64 sum = 0;
    int id = begin + lane;
    float next_raw = id < to ? raws[id] : 0;
    unsigned int next_word = id < to ? marks[id >> 5] : 0;
#pragma unroll 1
    for (; id < to; id += 32) {
        const float raw = next_raw;
        const unsigned int word = next_word;
        if (id + 32 < to) next_raw = raws[id + 32], next_word = marks[(id + 32) >> 5];
        const double value = selection.raw ? (double)raw : score_of(id, raw, word >> lane & 1);
        if (value - task.peak < least) continue;
        const u64 key = ordered_key(value);
        const int bucket = scale(value);
        int side = in.bucket < 0 ? 0 : bucket - in.bucket;
        if (in.bucket == bucket) side = in.side(key, id);
        if (visit == kCount ? side : side > 0) continue;
        const u64 weight = (visit == kCount ? selection.with_mass : !selection.raw) ? weight_of(value) : 0;
        if (visit == kCount) {
            count_part(in.bucket < 0 ? bucket : in.part_of(key, id), weight);
        } else if (side == 0 || visit == kListWhole) {
            const int at = atomicAdd(&scratch.listed, 1);
            scratch.list.keys[at] = key, scratch.list.weights[at] = weight, scratch.list.ids[at] = id;
        } else {
            sum += above_min_p(weight);
        }
    }
    return sum;
}

// Replace the interval by the part in which the selection ends.
__device__ __noinline__ void choose_part(Selection selection, const Histogram* sum) {
    Interval in = scratch.interval;
    Tally parts[4], mine = {0, 0};
    const int begin = 4 * threadIdx.x;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
        parts[b] = {selection.with_mass ? sum->mass[begin + b] : 0, sum->count[begin + b]};
        mine.mass += parts[b].mass, mine.count += parts[b].count;
    }
    const Scan scan = block_scan(mine);
    u64 before = selection.by_mass ? in.above_mass + scan.before.mass : in.above + scan.before.count;
    u64 target = in.target;
    if (!selection.by_mass) target = min(target, (u64)in.above + scan.all.count);
    else if (!target) target = top_p_of(scan.all.mass);
    in.target = target, in.above += scan.before.count, in.above_mass += scan.before.mass;
    int part = -1;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
        const u64 with = before + (selection.by_mass ? parts[b].mass : parts[b].count);
        if (before < target && target <= with) part = begin + b, in.count = parts[b].count;
        if (part < 0) in.above += parts[b].count, in.above_mass += parts[b].mass;
        before = with;
    }
    if (part >= 0) in.enter(part, scratch.scale, task.row.size), scratch.interval = in;
    __syncthreads();
}

// Add the ids of the share that are in the interval to the histogram of its parts, over the row.
__device__ void count_parts(Selection selection, Histogram* sum) {
    const Histogram& own = scratch.histogram;
    __builtin_assume(__isGlobal(sum));
    clear(scratch.histogram);
    __syncthreads();
    visit_share(selection, kCount);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBuckets; i += THREADS) {
        const int b = i + threadIdx.x;
        if (own.count[b]) atomicAdd(&sum->count[b], own.count[b]);
        if (own.mass[b]) atomicAdd(&sum->mass[b], own.mass[b]);
    }
}

// Whether all ids up to the interval's end fit in a list that is ended by counting.
__device__ __forceinline__ bool complete() { return scratch.interval.above + scratch.interval.count <= THREADS; }

// Find an interval whose ids can be listed. A target of few ids needs a complete list.
__device__ __noinline__ void select(Selection selection, u64 target, Scale scale) {
    RowExchange* const exchange = task.exchange;
    if (threadIdx.x == 0) scratch.scale = scale, scratch.interval = {target, 0, 0, 0, -1, 0, 0, 0, 0, 0};
    const bool few = !selection.by_mass && target <= THREADS / 2;
    do {
        Histogram* const sum = exchange->histograms + task.levels % 2;
        __syncthreads();
        count_parts(selection, sum);
        if (task.levels == 0) {
            row_barrier();
        } else if (is_last_at_barrier()) {
            clear(exchange->histograms[(task.levels + 1) % 2]);
            open_barrier();
        }
        if (threadIdx.x == 0) ++task.levels;
        choose_part(selection, sum);
    } while (!complete() && (few || scratch.interval.count > kListed));
}

// Put the ids of the interval on the exchange's list, with `whole` also those before it. Otherwise
// sum up the weights of those before it.
__device__ __noinline__ void list_ids(Selection selection, bool whole) {
    RowExchange* const exchange = task.exchange;
    if (threadIdx.x == 0) scratch.listed = 0;
    __syncthreads();
    u64 sum = visit_share(selection, whole ? kListWhole : kListSome);
    if (!whole) {
#pragma unroll
        for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        if (threadIdx.x % 32 == 0) exchange->sums[task.share * kWarps + threadIdx.x / 32] = sum;
    }
    __syncthreads();
    const int own = scratch.listed;
    if (!own) return;
    if (threadIdx.x == 0) scratch.first = atomicAdd(&exchange->listed, own);
    __syncthreads();
    const int first = scratch.first;
#pragma unroll 1
    for (int i = threadIdx.x; i < own; i += THREADS) {
        exchange->list.keys[first + i] = scratch.list.keys[i], exchange->list.ids[first + i] = scratch.list.ids[i];
        exchange->list.weights[first + i] = scratch.list.weights[i];
    }
}

// The rank of thread t's id among the first `n` of the list.
struct Rank {
    int id;
    unsigned int count;  // of the ids before it
    u64 mass, weight;    // of the ids before it; its own
    bool kept;
};

// End the selection in the exchange's list, by one block. If the list is not whole, scratch.last
// and scratch.mass are the selection's last place and mass, and scratch.sums its weights by warp.
__device__ __noinline__ Rank end_in_list(Selection selection, bool whole) {
    const List& list = task.exchange->list;
    __builtin_assume(__isGlobal(task.exchange));
    const int t = threadIdx.x, n = (int)(scratch.interval.count + (whole ? scratch.interval.above : 0));
    if (!whole) {
#pragma unroll
        for (int i = 0; i < kBuckets; i += THREADS) {
            const int b = i + t;
            scratch.sums[b] = b < task.shares * kWarps ? task.exchange->sums[b] : 0;
        }
    }
    if (t == 0) scratch.listed = 0;
#pragma unroll 1
    while (!whole && scratch.interval.count > kRanked) {
        const Interval in = scratch.interval;
        clear(scratch.histogram);
        __syncthreads();
#pragma unroll 1
        for (int i = t; i < n; i += THREADS) {
            const u64 key = list.keys[i];
            const int id = list.ids[i];
            if (in.side(key, id) == 0) count_part(in.part_of(key, id), list.weights[i]);
        }
        __syncthreads();
        choose_part(selection, &scratch.histogram);
    }
    const Interval in = scratch.interval;
    __syncthreads();
#pragma unroll 1
    for (int i = t; i < n; i += THREADS) {
        const Place place = {list.keys[i], list.ids[i]};
        const u64 weight = list.weights[i];
        const int side = whole ? 0 : in.side(place.key, place.id);
        if (side < 0) add_shared(&scratch.sums[place.id / task.each], above_min_p(weight));
        if (side) continue;
        const int at = atomicAdd(&scratch.listed, 1);
        scratch.places[at] = place, scratch.masses[at] = weight;
    }
    __syncthreads();
    const int listed = scratch.listed, padded = (listed + 3) / 4 * 4;
    if (listed <= t && t < padded) scratch.places[t] = {0, 0x7fffffff}, scratch.masses[t] = 0;
    __syncthreads();
    Rank mine = {-1, whole ? 0 : in.above, whole ? 0 : in.above_mass, 0, false};
    if (t < listed) {
        const Place place = scratch.places[t];
        mine.id = place.id, mine.weight = scratch.masses[t];
#pragma unroll 1
        for (int i = 0; i < padded; i += 4) {
#pragma unroll
            for (int e = i; e < i + 4; ++e)
                if (scratch.places[e].before(place)) ++mine.count, mine.mass += scratch.masses[e];
        }
        mine.kept = selection.by_mass ? mine.mass < in.target : mine.count < in.target;
        const bool last = selection.by_mass ? in.target <= mine.mass + mine.weight : mine.count + 1 == in.target;
        if (mine.kept && last) scratch.last = place, scratch.mass = mine.mass + mine.weight;
        if (mine.kept && !whole) add_shared(&scratch.sums[place.id / task.each], above_min_p(mine.weight));
    }
    __syncthreads();
    return mine;
}
