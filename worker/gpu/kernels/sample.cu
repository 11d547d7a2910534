// One token from one row of logits: bias, penalties, masks, temperature, top-k, top-p, min-p, draw; log-probabilities.
//
//   w_i = exp((s_i - max s) / temperature), drawn: the first kept id whose running sum of w exceeds u · (their sum).
// Weights are integers of 2^-44, so sums are exact in any order and the same on every device; scores are f64, as in the
// twin. u is Philox4x32-10's (Salmon et al., SC'11) of (seed, index). Ties go to the lower id everywhere.
//
// logits [V] f32; mask [V] u8: 1 padding, 2 end token; counts [V] i32 of tokens that penalties count; bias [V] f64;
// scores, weights [V] scratch. Grid (C), C ≤ multiprocessors and ≤ 256, 256 threads; block b owns ⌈V/C⌉ ids.
// Writes `drawn`, and the next step's `token`, `position`, `index` and counts. Barriers: 1 greedy, 2 plain, 2 + 1–8 for
// each of top-k and top-p. Bytes: the logits once, 16 a row of V in L2 a pass.
// Twin: worker/cpu/sampler.py.
#include "pdl.cuh"
#include "sampling.cuh"

// One thread of the grid finds the id and commits it.
__device__ void draw(const Request& r, const double* scores, u64* weights, double peak, int size, int lo, int hi,
                     const Slot& slot, Board* board, SelectScratch& shared) {
    u64 own = 0, total, base;
    for (int i = lo + threadIdx.x; i < hi; i += kThreads)
        own += weights[i] = (u64)__double2ll_rn(exp((scores[i] - peak) / r.temperature) * kOne);
    block_scan(own, shared.warps, total);
    if (threadIdx.x == 0) board->slices[blockIdx.x].mass = total;
    grid_barrier(&board->barrier);
    block_scan(threadIdx.x < gridDim.x ? board->slices[threadIdx.x].mass : 0, shared.warps, total);

    const auto key_of = [=](int i) { return ordered_key(scores[i]); };
    const auto mass_of = [=](int i) { return weights[i]; };
    Cutoff cut = {0, 0, total};
    if (r.top_k > 0 && r.top_k < size)
        cut = cutoff(key_of, mass_of, lo, hi, r.top_k, false, board->histograms[0], &board->barrier, shared);
    if (r.top_p < 1.0) {
        const u64 wanted = max(1ull, min(cut.mass, (u64)ceil(r.top_p * (double)cut.mass)));
        cut = cutoff(key_of, mass_of, lo, hi, wanted, true, board->histograms[1], &board->barrier, shared);
    }
    const Chunk chunk(lo, hi);
    const double least = r.min_p * kOne;
    own = 0;
    for_each_kept(cut, chunk, key_of, board, shared.warps, [&](int i) {
        if ((double)weights[i] < least) weights[i] = 0;
        own += weights[i];
        weights[i] |= 1ull << 63;
    });
    const u64 before = block_scan(own, shared.warps, total);
    if (threadIdx.x == 0) board->slices[blockIdx.x].kept = total;
    grid_barrier(&board->barrier);
    const u64 kept = threadIdx.x < gridDim.x ? board->slices[threadIdx.x].kept : 0;
    block_scan(threadIdx.x < blockIdx.x ? kept : 0, shared.warps, base);
    block_scan(kept, shared.warps, total);
    const u64 x = philox_word(r.seed, r.index) >> 8;
    const u64 at = __umul64hi(x, total) << 40 | x * total >> 24;  // ⌊u · total⌋
    u64 reached = base + before;
    if (at < reached || at >= reached + own) return;
    for (int i = chunk.begin; i < chunk.end; ++i) {
        if (!(weights[i] >> 63)) continue;
        reached += weights[i] & ~(1ull << 63);
        if (reached > at) {
            commit(slot, i, board);
            return;
        }
    }
}

// Log-probabilities of the raw logits: the committed token's, and the `count` highest by falling logit.
__device__ void report(const Logits& row, double raw_best, int count, int lo, int hi, Drawn* drawn, Board* board,
                       SelectScratch& shared) {
    __shared__ double sums[kThreads];
    const int t = threadIdx.x;
    sums[t] = 0;
    for (int i = lo + t; i < hi; i += kThreads) sums[t] += exp((double)row.raw[i] - raw_best);
    for (int half = kThreads / 2; half; half /= 2) {
        __syncthreads();
        if (t < half) sums[t] += sums[t + half];
    }
    if (t == 0) board->slices[blockIdx.x].raw_sum = sums[0];

    const auto key_of = [=](int i) { return ordered_key(row.raw[i]); };
    const auto no_mass = [](int) { return 0ull; };
    Cutoff cut = {0, 0, 0};
    if (count > 0 && count < row.size)
        cut = cutoff(key_of, no_mass, lo, hi, count, false, board->histograms[2], &board->barrier, shared);
    if (count > 0)
        for_each_kept(cut, Chunk(lo, hi), key_of, board, shared.warps,
                      [&](int i) { board->list[atomicAdd(&board->listed, 1)] = i; });
    grid_barrier(&board->barrier);
    if (blockIdx.x) return;
    double sum = 0;
    for (int b = 0; b < gridDim.x; ++b) sum += board->slices[b].raw_sum;
    const double log_sum = log(sum);
    if (t == 0) drawn->count = count, drawn->logprob = board->id < 0 ? 0 : row.raw[board->id] - raw_best - log_sum;
    if (t >= count) return;
    const int id = board->list[t];
    int rank = 0;
    for (int u = 0; u < count; ++u) {
        const int other = board->list[u];
        rank += row.raw[other] > row.raw[id] || (row.raw[other] == row.raw[id] && other < id);
    }
    drawn->top_ids[rank] = id;
    drawn->top_logprobs[rank] = row.raw[id] - raw_best - log_sum;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sample(const float* raw, const unsigned char* mask, int* counts, const double* bias, int size, int* token,
           int* position, Request* request, Drawn* drawn, double* scores, u64* weights, Board* board) {
    __shared__ SelectScratch shared;
    const Logits row = {raw, mask, counts, bias, size};
    const Slot slot = {token, position, counts, request, drawn};
    const Request r = *slot.request;  // the step's own, which its end moves on
    grid_dependency_wait();
    const int t = threadIdx.x, each = (row.size + gridDim.x - 1) / gridDim.x;
    const int lo = min(row.size, (int)blockIdx.x * each), hi = min(row.size, lo + each);
    if (r.forced >= 0) {
        if (t == 0 && blockIdx.x == 0) commit(slot, r.forced, board);
        return;
    }
    u64* zeros = reinterpret_cast<u64*>(board->histograms);
    const int bins = r.temperature > 0 || r.logprobs >= 0 ? sizeof(board->histograms) / sizeof(u64) : 0;
    for (int i = blockIdx.x * kThreads + t; i < bins; i += gridDim.x * kThreads) zeros[i] = 0;
    if (t == 0 && blockIdx.x == 0) board->listed = 0;
    const Best mine = best_in(row, r, scores, lo, hi);
    if (t == 0) board->slices[blockIdx.x].best = mine;
    grid_barrier(&board->barrier);

    const Best all = best_of(t < gridDim.x ? board->slices[t].best : Best{-(double)kInfinity, -(double)kInfinity, -1, 0});
    const double peak = all.score, raw_best = all.raw;
    int id = all.id;
    if (all.broken || fabs(peak) == (double)kInfinity) id = -1;
    if (id >= 0 && r.temperature > 0) {
        draw(r, scores, weights, peak, row.size, lo, hi, slot, board, shared);
    } else if (t == 0 && blockIdx.x == 0) {
        commit(slot, id, board);
    }
    if (r.logprobs >= 0) report(row, raw_best, min(r.logprobs, min(kTop, row.size)), lo, hi, slot.drawn, board, shared);
}
