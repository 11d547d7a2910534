// Top-k and top-p of one row without sorting the vocabulary; the result of `cutoff` of select.cuh.
//
// Scores are divided into 2^30 intervals of equal width below the highest one. A histogram of 2^10
// of them finds the one that contains the end of the selection; if it holds more than kListed ids,
// a histogram of its 2^10 parts follows, and so on. Its ids' keys are then listed and sorted by one
// block. Only ids whose scores are (almost) equal can be more than kListed: bisection of their keys
// then takes one pass over the logits a step, or one in all if they are equal.
// Counts and masses are integers, so no order of additions matters.
// Twin: `_largest` and `_nucleus` in worker/cpu/sampler.py.
#pragma once
#include "row_board.cuh"

// Intervals of scores: 2^30 of width 1 / scale below `top`. Ids beyond are in interval kBeyond.
struct Scale {
    double top, scale;
    static constexpr unsigned int kBeyond = (1u << kLevels * kBucketBits) - 1;

    Scale() = default;
    __device__ Scale(double top, double range) : top(top), scale(fmin((double)kBeyond / range, 1e300)) {}
    __device__ unsigned int operator()(double score) const {
        return (unsigned int)fmin((top - score) * scale, (double)kBeyond);
    }
};

struct RowScratch {
    union {
        Histogram histogram;
        u64 keys[kListed];
    };
    u64 warps[32];
    Scale scale;
    Interval interval;  // a copy of the board's
};

// exp((score - peak) / temperature) in units of 2^-44; 0 below exp(-32), where it would round to 0.
__device__ __noinline__ u64 weight_of(const RowTask* task, double score) {
    const double d = score - task->peak, temperature = task->request.temperature;
    if (d < -32.0 * temperature) return 0;
    return (u64)__double2ll_rn(exp(temperature == 1.0 ? d : d / temperature) * kOne);
}

__device__ __forceinline__ double score_of_key(u64 key) {
    return __longlong_as_double((long long)(key >> 63 ? key & ~(1ull << 63) : ~key));
}

// Selects from the ids' values: scores or raw logits. Value: value(id, raw, mark); Mass: mass(value).
template <typename Value, typename Mass>
struct Selection {
    RowTask& task;
    RowScratch& scratch;
    const Value value;
    const Mass mass;
    const bool with_mass, by_mass;

    // Call visit(value, interval) for the ids of the current interval in this block's share.
    template <typename Visit>
    __device__ __forceinline__ void for_each_in(const Interval& in, Visit visit) const {
        const unsigned int prefix = in.prefix;
        const int shift = in.shift, all = !in.reached;
        const Scale scale = scratch.scale;
        for_each_id(task, [&](int id, float raw, unsigned int mark) {
            const double v = value(id, raw, mark);
            const unsigned int interval = scale(v);
            if (all || (interval != Scale::kBeyond && interval >> shift == prefix)) visit(v, interval);
        });
    }

    // Add the ids of the interval to the histogram of its 2^10 parts.
    __device__ void count_parts(const Interval& in, Histogram* sum) const {
        Histogram& own = scratch.histogram;
        __builtin_assume(__isGlobal(sum));
        clear(own);
        __syncthreads();
        const int shift = in.shift - kBucketBits;
        for_each_in(in, [&](double v, unsigned int interval) {
            const int bucket = interval >> shift & (kBuckets - 1);
            atomicAdd(&own.count[bucket], 1u);
            if (!with_mass) return;
            const u64 m = mass(v);
            if (m) atomicAdd(&own.mass[bucket], m);
        });
        __syncthreads();
        for (int b = threadIdx.x; b < kBuckets; b += THREADS) {
            if (own.count[b]) atomicAdd(&sum->count[b], own.count[b]);
            if (own.mass[b]) atomicAdd(&sum->mass[b], own.mass[b]);
        }
    }

    // The part of the interval that contains the target; run by one block. `target_of(total mass)`
    // is the target if it is not known yet.
    template <typename TargetOf>
    __device__ void choose_part(const Interval& in, const Histogram& sum, TargetOf target_of) const {
        constexpr int kEach = kBuckets / THREADS;
        Interval& next = task.board->interval;
        u64 count = 0, masses = 0, all, all_mass;
        const int begin = kEach * threadIdx.x, end = begin + kEach;
        for (int b = begin; b < end; ++b) count += sum.count[b], masses += sum.mass[b];
        u64 above = in.above + block_scan(count, scratch.warps, all);
        u64 above_mass = in.above_mass + block_scan(masses, scratch.warps, all_mass);
        const u64 target = in.target ? in.target : target_of(all_mass);
        if (threadIdx.x == 0) {
            next = in, next.target = target;
            next.reached = target <= (by_mass ? in.above_mass + all_mass : in.above + all);
            if (!next.reached) next.above = 0, next.above_mass = 0, next.count = task.row.size;
            task.board->cut = {0, 0, all_mass};  // if the target is not reached: all ids
        }
        __syncthreads();
        for (int b = begin; b < end; ++b) {
            const u64 before = by_mass ? above_mass : above, with = before + (by_mass ? sum.mass[b] : sum.count[b]);
            if (before < target && target <= with) {
                next.above = above, next.above_mass = above_mass, next.count = sum.count[b];
                next.prefix = in.prefix << kBucketBits | b, next.shift = in.shift - kBucketBits;
            }
            above += sum.count[b], above_mass += sum.mass[b];
        }
    }

    // Divide the ids of the interval at the middle of their keys, until kListed are left or all are
    // equal.
    __device__ void bisect() const {
        RowBoard* const board = task.board;
        while (board->interval.count > kListed) {
            const Interval in = board->interval;
            u64 low = ~0ull, high = 0;
            for_each_in(in, [&](double v, unsigned int) {
                const u64 key = ordered_key(v);
                if (in.low <= key && key <= in.high) low = min(low, key), high = max(high, key);
            });
            share_extremes(low, high);
            meet(task, [&] { choose_middle(); });
            const Interval halves = board->interval;
            if (halves.low == halves.high) return;
            u64 count = 0, masses = 0, counts, all;
            for_each_in(halves, [&](double v, unsigned int) {
                const u64 key = ordered_key(v);
                if (halves.middle < key && key <= halves.high) ++count, masses += with_mass ? mass(v) : 0;
            });
            block_scan(count, scratch.warps, counts);
            block_scan(masses, scratch.warps, all);
            if (threadIdx.x == 0) board->shares[task.share].count = counts, board->shares[task.share].mass = all;
            meet(task, [&] { choose_half(); });
        }
    }

    __device__ void share_extremes(u64 low, u64 high) const {
        for (int lane = 16; lane; lane /= 2) {
            low = min(low, __shfl_xor_sync(0xffffffffu, low, lane));
            high = max(high, __shfl_xor_sync(0xffffffffu, high, lane));
        }
        u64* const lows = scratch.keys;
        __syncthreads();
        if (threadIdx.x % 32 == 0) lows[threadIdx.x / 32] = low, lows[32 + threadIdx.x / 32] = high;
        __syncthreads();
        if (threadIdx.x) return;
        for (int w = 1; w < THREADS / 32; ++w) low = min(low, lows[w]), high = max(high, lows[32 + w]);
        task.board->shares[task.share].low = low, task.board->shares[task.share].high = high;
    }

    __device__ void choose_middle() const {
        if (threadIdx.x) return;
        Interval& in = task.board->interval;
        in.low = ~0ull, in.high = 0;
        for (int s = 0; s < task.shares; ++s) {
            in.low = min(in.low, task.board->shares[s].low), in.high = max(in.high, task.board->shares[s].high);
        }
        in.middle = in.low + (in.high - in.low) / 2;
    }

    __device__ void choose_half() const {
        u64 count, masses;
        over_shares(task, &ShareResult::count, scratch.warps, count);
        over_shares(task, &ShareResult::mass, scratch.warps, masses);
        if (threadIdx.x) return;
        Interval& in = task.board->interval;
        if (in.target <= (by_mass ? in.above_mass + masses : in.above + count)) {
            in.low = in.middle + 1, in.count = count;
        } else {
            in.above += count, in.above_mass += masses, in.count -= count, in.high = in.middle;
        }
    }

    // Append the keys of the interval's ids to the board's list.
    __device__ void list_keys() const {
        const Interval in = task.board->interval;
        for_each_in(in, [&](double v, unsigned int) {
            const u64 key = ordered_key(v);
            if (in.low <= key && key <= in.high) task.board->keys[atomicAdd(&task.board->listed, 1)] = key;
        });
    }

    // Sort the listed keys, descending, and find the end of the selection; run by one block.
    __device__ void end_in_list() const {
        const Interval in = task.board->interval;
        const int count = (int)in.count;
        int size = THREADS;
        while (size < count) size *= 2;
        u64* const keys = scratch.keys;
        for (int i = threadIdx.x; i < size; i += THREADS) keys[i] = i < count ? task.board->keys[i] : 0;
        for (int k = 2; k <= size; k *= 2) {
            for (int j = k / 2; j; j /= 2) {
                __syncthreads();
                for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                    const int a = 2 * i - (i & (j - 1)), b = a + j;
                    const u64 x = keys[a], y = keys[b];
                    if ((x < y) == ((a & k) == 0)) keys[a] = y, keys[b] = x;
                }
            }
        }
        __syncthreads();
        const int each = size / THREADS, begin = min(count, each * (int)threadIdx.x), end = min(count, begin + each);
        u64 own = 0, all;
        if (with_mass)
            for (int i = begin; i < end; ++i) own += mass(score_of_key(keys[i]));
        u64 masses = in.above_mass + block_scan(own, scratch.warps, all);
        for (int i = begin; i < end; ++i) {
            const u64 m = with_mass ? mass(score_of_key(keys[i])) : 0;
            const u64 before = by_mass ? masses : in.above + i, with = by_mass ? masses + m : before + 1;
            masses += m;
            if (before < in.target && in.target <= with) publish(keys, count, i, masses);
        }
        if (threadIdx.x == 0) task.board->listed = 0;
    }

    // The selection ends with the key at `last`.
    __device__ void publish(const u64* keys, int count, int last, u64 masses) const {
        int first = last, next = last + 1;
        while (first && keys[first - 1] == keys[last]) --first;
        while (next < count && keys[next] == keys[last]) ++next;
        const bool all = next == last + 1;
        const u64 ties = all ? 0 : last + 1 - first;
        task.board->cut = {all && keys[last] ? keys[last] - 1 : keys[last], ties, masses};
    }

    __device__ void end_in_equal_keys() const {
        if (threadIdx.x) return;
        const Interval in = task.board->interval;
        const u64 each = with_mass ? mass(score_of_key(in.low)) : 0;
        const u64 ties = by_mass ? (in.target - in.above_mass + each - 1) / each : in.target - in.above;
        task.board->cut = {in.low, ties, in.above_mass + ties * each};
    }

    // The end of the shortest prefix of the ids, by descending value, then ascending id, that has
    // `target` ids or this mass. If `filled`, `first` holds the histogram of all ids. If fewer ids
    // are within the scale: all ids, or with `exact` the end among the others. Written to task.cut.
    template <typename TargetOf>
    __device__ void run(Scale scale, Histogram* first, bool filled, u64 target, TargetOf target_of,
                        bool exact) const {
        RowBoard* const board = task.board;
        if (threadIdx.x == 0) scratch.scale = scale;
        if (threadIdx.x == 0) scratch.interval = {target, 0, 0, 0, 0, ~0ull, 0, 0, kLevels * kBucketBits, 1};
        __syncthreads();
        for (int level = 0; level < kLevels; ++level) {
            Histogram* const sum = level ? &board->other : first;
            if (level || !filled) count_parts(scratch.interval, sum);
            meet(task, [&] {
                choose_part(scratch.interval, *sum, target_of);
                __syncthreads();
                if (sum == &board->other) clear(*sum);
            });
            if (threadIdx.x == 0) scratch.interval = board->interval;
            __syncthreads();
            if (!scratch.interval.reached || scratch.interval.count <= kListed) break;
        }
        if (scratch.interval.reached || exact) {
            bisect();
            const Interval found = board->interval;
            const bool equal = found.count > kListed;
            if (!equal) list_keys();
            meet(task, [&] { equal ? end_in_equal_keys() : end_in_list(); });
        }
        if (threadIdx.x == 0) task.cut = board->cut;
        __syncthreads();
    }
};
