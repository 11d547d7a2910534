// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of one element of a head; twin: `rotate`, worker/cpu/plain.py.
//
// Pair i of a head turns by the angle whose cosine and sine stand at [position][i] of two tables [context, dims/2] f32
// that already hold the magnitude. ADJACENT pairs (2i, 2i+1), else (i, i + dims/2). Elements from `dims` on stay.
#pragma once

struct RopeTables {
    const float* cos;  // [context, dims/2]
    const float* sin;
    int dims;
};

// How one element turns, for who knows the position before the head is there: with the element that it turns against.
struct Turn {
    float cos, sin;
    int partner;
};

// Of element `e` at `position`.
template <bool ADJACENT>
__device__ __forceinline__ Turn turn_of(int e, int position, const RopeTables rope) {
    if (e >= rope.dims) return {1.f, 0.f, e};
    const int half = rope.dims / 2;
    const bool first = ADJACENT ? e % 2 == 0 : e < half;
    const int pair = ADJACENT ? e / 2 : (first ? e : e - half);
    const size_t at = (size_t)position * half + pair;
    const float sin = rope.sin[at];
    return {rope.cos[at], first ? -sin : sin, ADJACENT ? e ^ 1 : (first ? e + half : e - half)};
}

__device__ __forceinline__ float turned(float x, float partner, const Turn turn) { return x * turn.cos + partner * turn.sin; }

// Two elements of a head that turn together, or neither of which turns: the i-th of D/2 such pairs.
template <int D, bool ADJACENT>
struct RopePair {
    int first, second;
    __device__ __forceinline__ RopePair(int i, int dims) {
        const int half = dims / 2;
        const bool neighbours = ADJACENT || i >= half;
        first = neighbours ? 2 * i : i, second = neighbours ? 2 * i + 1 : i + half;
    }
    // Both elements of the head at `head`, turned to `position`.
    __device__ __forceinline__ float2 rotated(const float* head, int position, const RopeTables rope) const {
        const float x = head[first], y = head[second];
        if (first >= rope.dims) return make_float2(x, y);
        const size_t at = (size_t)position * (rope.dims / 2) + (ADJACENT ? first / 2 : first);
        const float c = rope.cos[at], s = rope.sin[at];
        return make_float2(x * c - y * s, y * c + x * s);
    }
};
