// Rotary position embedding (RoFormer, Su et al. 2021, arXiv:2104.09864).
//
//   (x, y) → (x·cos - y·sin, y·cos + x·sin) for pair i of a head, with cos and sin [position][i]
// The tables [context, dims/2] f32 include the magnitude factor. Pair i is (2i, 2i+1) if ADJACENT,
// else (i, i + dims/2). Elements from `dims` on are copied. Each result is one product, rounded,
// and one FMA.
// Twin: `rotate` in worker/cpu/plain.py. Users: rope_kv.cu, matmul_wgmma_rope.cu,
// kv_rows.cu, attention_decode.cu, attention_few_rows.cu, attention_rows.cu.
#pragma once

struct RopeTables {
    const float* cos;  // [context, dims/2]
    const float* sin;
    int dims;
};

// The rotation of one element, read before the head is available: cosine, signed sine, and the
// index of the other element of its pair.
struct Rotation {
    float cos, sin;
    int partner;
};

// The rotation of element `e` at `position`.
template <bool ADJACENT>
__device__ __forceinline__ Rotation rotation_of(int e, int position, const RopeTables rope) {
    if (e >= rope.dims) return {1.f, 0.f, e};
    const int half = rope.dims / 2;
    const bool first = ADJACENT ? e % 2 == 0 : e < half;
    const int pair = ADJACENT ? e / 2 : (first ? e : e - half);
    const size_t at = (size_t)position * half + pair;
    const float sin = rope.sin[at];
    return {rope.cos[at], first ? -sin : sin, ADJACENT ? e ^ 1 : (first ? e + half : e - half)};
}

__device__ __forceinline__ float rotate(float x, float partner, const Rotation r) {
    return fmaf(x, r.cos, partner * r.sin);
}

// Elements e … e + 3 of a head, rotated by their rotations.
template <bool ADJACENT>
__device__ __forceinline__ float4 rotated(const float* head, int e, const Rotation (&rotations)[4]) {
    const float4 x = *reinterpret_cast<const float4*>(head + e);
    const float4 other = ADJACENT ? make_float4(x.y, x.x, x.w, x.z)
                                  : make_float4(head[rotations[0].partner], head[rotations[1].partner],
                                                head[rotations[2].partner], head[rotations[3].partner]);
    return make_float4(rotate(x.x, other.x, rotations[0]), rotate(x.y, other.y, rotations[1]),
                       rotate(x.z, other.z, rotations[2]), rotate(x.w, other.w, rotations[3]));
}

// The rotations of elements e … e + 3 at `position`.
template <bool ADJACENT>
__device__ __forceinline__ void load_rotations(Rotation (&rotations)[4], int e, int position, const RopeTables rope) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rotations[i] = rotation_of<ADJACENT>(e + i, position, rope);
}

// Elements e … e + 3 of a head, rotated to `position`.
template <bool ADJACENT>
__device__ __forceinline__ float4 rotated(const float* head, int e, int position, const RopeTables rope) {
    Rotation rotations[4];
    load_rotations<ADJACENT>(rotations, e, position, rope);
    return rotated<ADJACENT>(head, e, rotations);
}

// The rotations of the elements lane, lane + 32, … of a head.
template <int D, bool ADJACENT>
struct WarpRotation {
    Rotation rotations[D / 32];

    __device__ __forceinline__ void load(int position, const RopeTables rope) {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) rotations[i] = rotation_of<ADJACENT>(threadIdx.x % 32 + 32 * i, position, rope);
    }
    __device__ __forceinline__ void rotate_head(float (&x)[D / 32], const float* head) const {
#pragma unroll
        for (int i = 0; i < D / 32; ++i)
            x[i] = rotate(head[threadIdx.x % 32 + 32 * i], head[rotations[i].partner], rotations[i]);
    }
};

// The elements of the i-th pair of a head: two that rotate together, or two that are copied.
__device__ __forceinline__ int2 rope_pair(int i, int dims, bool adjacent) {
    const int half = dims / 2;
    return adjacent || i >= half ? make_int2(2 * i, 2 * i + 1) : make_int2(i, i + half);
}

__device__ __forceinline__ float2 rotate_pair(float x, float y, float cos, float sin) {
    return make_float2(fmaf(x, cos, -(y * sin)), fmaf(y, cos, x * sin));
}

// The i-th of D/2 pairs of a head.
template <int D, bool ADJACENT>
struct RopePair {
    int first, second;
    __device__ __forceinline__ RopePair(int i, int dims) {
        const int2 pair = rope_pair(i, dims, ADJACENT);
        first = pair.x, second = pair.y;
    }
    // Both elements of `head`, rotated to `position`.
    __device__ __forceinline__ float2 rotate(const float* head, int position, const RopeTables rope) const {
        const float x = head[first], y = head[second];
        if (first >= rope.dims) return make_float2(x, y);
        const size_t at = (size_t)position * (rope.dims / 2) + (ADJACENT ? first / 2 : first);
        return rotate_pair(x, y, rope.cos[at], rope.sin[at]);
    }
};
