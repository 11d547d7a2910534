// Log-probabilities: exp sums over fixed slices of the vocabulary.
//
// The f64 sum is the sampler's only sum whose order matters: LOGPROB_SLICES slices, each by one
// block of THREADS threads, then slice by slice, whatever the grid.
// Users: sample.cu. Twin: `log_softmax` in worker/cpu/sampler.py.
#pragma once
#include "sampling.cuh"

// Sum exp(l - raw_best) over each slice of the vocabulary: by thread with stride THREADS, then
// pairwise over the threads. Blocks take slices block, block + blocks, …, so the sums do not depend
// on the grid.
__device__ __forceinline__ void sum_slices(const float* raw, int size, double raw_best, int block, int blocks,
                                           double* slice_sums) {
    __shared__ double sums[THREADS];
    const int t = threadIdx.x, each = (size + LOGPROB_SLICES - 1) / LOGPROB_SLICES;
#pragma unroll 1
    for (int slice = block; slice < LOGPROB_SLICES; slice += blocks) {
        const int lo = min(size, slice * each), hi = min(size, lo + each);
        sums[t] = 0;
        for (int i = lo + t; i < hi; i += THREADS) sums[t] = __dadd_rn(sums[t], exp((double)raw[i] - raw_best));
        for (int half = THREADS / 2; half; half /= 2) {
            __syncthreads();
            if (t < half) sums[t] = __dadd_rn(sums[t], sums[t + half]);
        }
        if (t == 0) slice_sums[slice] = sums[0];
        __syncthreads();
    }
}

__device__ __forceinline__ double log_of_slices(const double* slice_sums) {
    double sum = 0;
#pragma unroll 16
    for (int s = 0; s < LOGPROB_SLICES; ++s) sum = __dadd_rn(sum, slice_sums[s]);
    return log(sum);
}
