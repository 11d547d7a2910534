// Log-probabilities: exp sums over fixed slices of the vocabulary, and the report of the highest.
//
// The f64 sum is the sampler's only sum whose order matters: LOGPROB_SLICES slices, each by one
// block of THREADS threads, then slice by slice, whatever the grid.
// Users: sample.cu, sample_rows.cu. Twin: `log_softmax` in worker/cpu/sampler.py.
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

// Write the log-probabilities of the token `id` and of the `count` ids of `list`, in descending
// order. Called by one block.
__device__ __forceinline__ void write_log_probabilities(const float* raw, double raw_best, int count, int id,
                                                        const int* list, const double* slice_sums, Drawn* drawn) {
    const int t = threadIdx.x;
    double sum = 0;
#pragma unroll 16
    for (int s = 0; s < LOGPROB_SLICES; ++s) sum = __dadd_rn(sum, slice_sums[s]);
    const double log_sum = log(sum);
    if (t == 0) drawn->count = count, drawn->logprob = id < 0 ? 0 : raw[id] - raw_best - log_sum;
    if (t >= count) return;
    const int listed = list[t];
    int rank = 0;
    for (int u = 0; u < count; ++u) {
        const int other = list[u];
        rank += raw[other] > raw[listed] || (raw[other] == raw[listed] && other < listed);
    }
    drawn->top_ids[rank] = listed;
    drawn->top_logprobs[rank] = raw[listed] - raw_best - log_sum;
}
