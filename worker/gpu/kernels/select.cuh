// Top-k and top-p without sorting: radix select over 64-bit keys by the whole grid, eight bits a
// round.
//
// Elements are ordered by descending key, then ascending index. Each block computes elements [lo,
// hi). `cutoff` returns the end of the shortest prefix of that order that holds `target` elements,
// or whose masses reach `target`. Masses are integers, so the order of additions does not matter
// and every block computes the same result. Each round costs one grid barrier. Users: sample.cu.
// Twin: `_largest` and `_nucleus` in worker/cpu/sampler.py.
#pragma once
#include "grid.cuh"

constexpr int kBins = 256, kRounds = 8;

struct Bin {
    u64 count, mass;
};

// The kept elements: keys above `key`, and the first `ties` of those equal to it; `mass` is their
// total mass.
struct Cutoff {
    u64 key, ties, mass;
};

// Ascending with x; -0 equals +0, and NaN has the lowest key.
__device__ __forceinline__ u64 ordered_key(double x) {
    if (x != x) return 0;
    const u64 bits = (u64)__double_as_longlong(x + 0.0);
    return bits >> 63 ? ~bits : bits | 1ull << 63;
}

struct SelectScratch {
    Bin bins[kBins];
    u64 warps[32];
    u64 digit, above, above_mass;
    Bin chosen;
};

// `histogram` [kRounds][kBins] is zero and visible to all blocks; key_of(i) and mass_of(i) belong
// to element i.
template <typename KeyOf, typename MassOf>
__device__ Cutoff cutoff(KeyOf key_of, MassOf mass_of, int lo, int hi, u64 target, bool by_mass,
                         Bin (*histogram)[kBins], Barrier* barrier, SelectScratch& shared) {
    u64 prefix = 0, above = 0, above_mass = 0;
    Bin chosen = {};
    for (int round = 0; round < kRounds; ++round) {
        const int shift = 56 - 8 * round;
        shared.bins[threadIdx.x] = {};
        __syncthreads();
        for (int i = lo + threadIdx.x; i < hi; i += blockDim.x) {
            const u64 key = key_of(i);
            if (round && key >> (shift + 8) != prefix) continue;
            Bin& bin = shared.bins[key >> shift & 255];
            atomicAdd(&bin.count, 1ull);
            atomicAdd(&bin.mass, mass_of(i));
        }
        __syncthreads();
        const Bin mine = shared.bins[threadIdx.x];
        if (mine.count) {
            atomicAdd(&histogram[round][threadIdx.x].count, mine.count);
            atomicAdd(&histogram[round][threadIdx.x].mass, mine.mass);
        }
        grid_barrier(barrier);
        const int digit = kBins - 1 - threadIdx.x;  // thread 0 has the highest keys
        const Bin bin = histogram[round][digit];
        u64 all;
        const u64 counts = above + block_scan(bin.count, shared.warps, all);
        const u64 masses = above_mass + block_scan(bin.mass, shared.warps, all);
        const u64 before = by_mass ? masses : counts, with = before + (by_mass ? bin.mass : bin.count);
        if (before < target && target <= with) {
            shared.digit = digit, shared.above = counts, shared.above_mass = masses;
            shared.chosen = bin;
        }
        __syncthreads();
        prefix = prefix << 8 | shared.digit;
        above = shared.above, above_mass = shared.above_mass, chosen = shared.chosen;
        __syncthreads();
        const bool whole = chosen.count == 1 || (!by_mass && above + chosen.count == target);
        if (whole) return {prefix ? (prefix << shift) - 1 : 0, 0, above_mass + chosen.mass};
    }
    const u64 each = chosen.mass / chosen.count;  // equal keys have equal masses
    const u64 ties = by_mass ? (target - above_mass + each - 1) / each : target - above;
    return {prefix, ties, above_mass + ties * each};
}
