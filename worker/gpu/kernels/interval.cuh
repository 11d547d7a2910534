// The order of ids by value, and intervals of it, among whose ids a selection ends.
//
// An interval of values is divided into 2^10 parts, the part into 2^10 parts of its keys, and so
// on; equal keys are divided by id.
// Users: select.cuh.
#pragma once
#include "row_exchange.cuh"

// Ascending with x; -0 equals +0, and NaN has the lowest key.
__device__ __forceinline__ u64 ordered_key(double x) {
    if (x != x) return 0;
    const u64 bits = (u64)__double_as_longlong(x + 0.0);
    return bits >> 63 ? ~bits : bits | 1ull << 63;
}

struct Place {  // in the order of ids
    u64 key;
    int id;
    __device__ bool before(const Place& other) const {
        return key > other.key || (key == other.key && id < other.id);
    }
};

// kBuckets intervals of the values from `top` down, the last of which is open. The first kFine
// divide a quarter of the range, in which most selections end; the others are 21 times as wide.
struct Scale {
    static constexpr int kFine = 896;
    static constexpr double kFineScale = 4.0 * kFine, kCoarseScale = (kBuckets - 1 - kFine) / 0.75;
    static constexpr double kBend = kFine - kCoarseScale / 4;  // kBend + kCoarseScale · x is kFine at x = 1/4
    double top, range, inverse;                                // x = (top - value) · inverse, in [0, 1]

    // f32 operations are monotonic too, and exact to 1e-4 of a bucket.
    __device__ int operator()(double value) const {
        const float x = (float)((top - value) * inverse);
        return (int)fminf(fminf(x * (float)kFineScale, fmaf(x, (float)kCoarseScale, (float)kBend)), kBuckets - 1.0f);
    }
    // The key of the value where a bucket begins.
    __device__ u64 key(double bucket) const {
        return ordered_key(top - range * fmax(bucket * (1 / kFineScale), (bucket - kBend) * (1 / kCoarseScale)));
    }
    // Keys that no value of the bucket exceeds: the margins are larger than rounding.
    __device__ u64 highest(int bucket) const { return key(bucket - 1e-3); }
    __device__ u64 lowest(int bucket) const { return bucket < kBuckets - 1 ? key(bucket + 1.001) : 0; }
};

// The ids among which a selection ends: `count` of them, after `above` ids of total mass
// `above_mass`.
struct Interval {
    u64 target, above_mass;
    unsigned int above, count;
    int bucket;           // of the scale; -1: all ids
    int shift;            // parts are 2^shift keys, or ids
    u64 low, high;        // keys
    int first, end;       // ids, once low == high

    // -1: before the interval, 0: in it, 1: behind it. Only for ids of its bucket.
    __device__ __forceinline__ int side(u64 key, int id) const {
        if (key != high || low != high) return key > high ? -1 : key < low;
        return id < first ? -1 : id >= end;
    }
    // The part that holds an id of the interval.
    __device__ __forceinline__ int part_of(u64 key, int id) const {
        return (int)((low < high ? high - key : (u64)(id - first)) >> shift);
    }
    // Replace the interval by its part i.
    __device__ void enter(int i, const Scale& scale, int size) {
        const u64 width = 1ull << shift;
        if (bucket < 0) {
            bucket = i, low = scale.lowest(i), high = scale.highest(i), first = 0, end = size;
        } else if (low < high) {
            high -= i * width;
            if (high - low >= width) low = high - width + 1;
        } else {
            first += (int)(i * width), end = min(end, first + (int)width);
        }
        const u64 range = low < high ? high - low : end - 1 - first;
        shift = range < kBuckets ? 0 : 64 - __clzll((long long)range) - kBucketBits;
    }
};
