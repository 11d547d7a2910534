// Sums of a decode product on the tensor cores: the upper levels of the tree over 32 chains, which
// the warps along K add through shared memory (matvec_mma_stages.cuh has the lower ones).
#pragma once
#include "matvec_mma.cuh"

// The sums of a lane in shared memory: [warp][4·FRAGS_M·NT][32]. Rows lane/4 and lane/4 + 8 of a
// token are adjacent, so that gate and up of an element are.
template <int FRAGS_M, int NT>
struct StoredSums {
    static constexpr int kEach = 4 * FRAGS_M * NT;
    float* own;
    __device__ __forceinline__ explicit StoredSums(float* shared)
        : own(shared + threadIdx.x / 32 * kEach * 32 + threadIdx.x % 32) {}
    template <class Use>
    __device__ __forceinline__ void each(Sums<FRAGS_M, NT>& v, Use use) const {
#pragma unroll
        for (int m = 0; m < FRAGS_M; ++m)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) use(v[m][n][i], own[(m * 4 * NT + 4 * n + i % 2 * 2 + i / 2) * 32]);
    }
    __device__ __forceinline__ void store(Sums<FRAGS_M, NT>& v) const {
        each(v, [](float& sum, float& at) { at = sum; });
    }
    __device__ __forceinline__ void add_to(Sums<FRAGS_M, NT>& v) const {
        each(v, [](float& sum, float& at) { sum = __fadd_rn(sum, at); });
    }
    // Row of the warp's and token of its tile of the sum at `index`.
    static __device__ __forceinline__ int row(int index) {
        return index / (4 * NT) * 16 + threadIdx.x % 32 / 4 + index % 2 * 8;
    }
    static __device__ __forceinline__ int token(int index) {
        const int n = index / 4 % NT;
        return n / 2 * 16 + threadIdx.x % 4 * 4 + n % 2 * 2 + index / 2 % 2;
    }
};

// y += the sums of one split: the upper levels of the tree, over the warps along K, each of which
// gets SHARE of a lane's sums. `shared`: the stored sums of all warps.
template <int WARPS_K, int FRAGS_M, int NT, int SHARE>
__device__ __forceinline__ void close_split(Sums<FRAGS_M, NT>& acc, float* shared, bool first, bool is_short,
                                            float (&y)[SHARE]) {
    using Stored = StoredSums<FRAGS_M, NT>;
    const int warp_k = threadIdx.x / 32 % WARPS_K;
    const Stored stored(shared);
    stored.store(acc);
    __syncthreads();
    const float* const from = stored.own + (warp_k * SHARE - warp_k * Stored::kEach) * 32;
#pragma unroll
    for (int k = 0; k < SHARE; ++k) {
        float v[WARPS_K];
#pragma unroll
        for (int w = 0; w < WARPS_K; ++w) v[w] = from[(w * Stored::kEach + k) * 32];
#pragma unroll
        for (int step = WARPS_K / 2; step; step /= 2)
#pragma unroll
            for (int w = 0; w < step; ++w) v[w] = __fadd_rn(v[w], v[w + step]);
        // Of a split with fewer than 32 units, `vec_dot`'s sum holds a +0, which turns -0 into +0.
        const float sum = is_short ? __fadd_rn(v[0], 0.f) : v[0];
        y[k] = first ? sum : __fadd_rn(y[k], sum);
    }
}

// The warp's place in its block.
template <int WARPS_K, int WARPS_M>
struct WarpPlace {
    int k, m, n;
    __device__ __forceinline__ WarpPlace() {
        const int warp = threadIdx.x / 32;
        k = warp % WARPS_K, m = warp / WARPS_K % WARPS_M, n = warp / (WARPS_K * WARPS_M);
    }
};
