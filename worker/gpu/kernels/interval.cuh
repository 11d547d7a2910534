// The order of ids by value, and intervals of it, among whose ids a selection ends.
//
// An interval of values is divided into 2^10 parts, the part into 2^10 parts of its keys, and so on;
// equal keys are divided by id.
// Users: select.cuh.
#pragma once
#include "row_board.cuh"

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

// kBuckets intervals of values below `top`, of width 1 / scale but for the last, which is open.
struct Scale {
    double top, scale;

    Scale() = default;
    __device__ Scale(double top, double range) : top(top), scale(fmin((kBuckets - 1) / range, 1e300)) {}
    __device__ int operator()(double value) const { return (int)fmin((top - value) * scale, kBuckets - 1.0); }
    // Keys that no value of the interval exceeds: the margins are larger than rounding.
    __device__ u64 highest(int bucket) const {
        return bucket < kBuckets - 1 ? ordered_key(top - (bucket - 1e-3) / scale) : ~0ull;
    }
    __device__ u64 lowest(int bucket) const {
        return bucket < kBuckets - 1 ? ordered_key(top - (bucket + 1.001) / scale) : 0;
    }
};

// The ids among which a selection ends: `count` of them, after `above` ids of total mass `above_mass`.
struct Interval {
    u64 target, above, above_mass, count;  // target 0: not known yet
    int bucket;                            // of the scale; -1: all ids
    u64 low, high;                         // keys
    int first, end;                        // ids, once low == high

    // Parts are 2^shift keys, or ids.
    __device__ int shift() const {
        const u64 range = low < high ? high - low : end - 1 - first;
        return range < kBuckets ? 0 : 64 - __clzll((long long)range) - kBucketBits;
    }
    __device__ Interval part(int i, const Scale& scale, u64 target, u64 above, u64 above_mass, u64 count, int size) const {
        Interval in = {target, above, above_mass, count, bucket, low, high, first, end};
        const u64 width = 1ull << (bucket < 0 ? 0 : shift());
        if (bucket < 0) {
            in.bucket = i, in.low = scale.lowest(i), in.high = scale.highest(i), in.first = 0, in.end = size;
        } else if (low < high) {
            in.high -= i * width;
            if (in.high - low >= width) in.low = in.high - width + 1;
        } else {
            in.first += (int)(i * width), in.end = min(end, in.first + (int)width);
        }
        return in;
    }
};
