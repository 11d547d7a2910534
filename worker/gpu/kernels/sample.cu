// Sampling: one row of logits to one token. Bias, penalties, masks, temperature, top-k, top-p,
// min-p, draw; log-probabilities.
//
//   w_i = exp((s_i - max s) / temperature); the first kept id with Σ_{j≤i} w_j > u · Σ w is drawn.
//   logprob_i = l_i - max l - log Σ exp(l - max l), of the raw logits l.
// Weights are integers of 2^-44: their sums are exact in any order. Scores are f64, as in the twin.
// u is Philox4x32-10 (Salmon et al., SC'11) of (seed, index). Ties go to the lower id. The f64 sum
// of the log-probabilities is the only sum whose order matters: it is taken over LOGPROB_SLICES
// slices of the vocabulary, each by one block of THREADS threads, then slice by slice, whatever the
// grid.
//
// Inputs: logits [V] f32; row_slots [1] i32, or null: slot 0; SlotArrays. Scratch: scores [V] f64,
// weights [V] u64, one GridScratch.
// Outputs: `drawn`; of an active slot the next token, position, index and counts.
// Grid (C), block THREADS; C ≤ the number of multiprocessors (grid.cuh) and ≤ LOGPROB_SLICES; block
// b computes ids [b·⌈V/C⌉, (b+1)·⌈V/C⌉). Grid barriers: 1 greedy, 2 plain, 2 + 1–8 for each of
// top-k and top-p.
// Alignment: of the elements. Bytes: the logits once, then 16 per id and pass, from L2; with MASKED 1
// also V/8 of the mask.
// Twin: worker/cpu/sampler.py.
#include "pdl.cuh"
#include "sampling.cuh"
#include "slice_sums.cuh"

// Ids [begin, end) of this thread: contiguous, so thread order is id order.
struct ThreadRange {
    int begin, end;
    __device__ ThreadRange(int lo, int hi) {
        const int each = (hi - lo + THREADS - 1) / THREADS;
        begin = min(hi, lo + (int)threadIdx.x * each), end = min(hi, begin + each);
    }
};

// Call visit(i) for each kept id of this thread's range. If the cutoff lies among equal keys, the
// blocks first exchange their numbers of such keys: one grid barrier.
template <typename KeyOf, typename Visit>
__device__ void for_each_kept(const Cutoff& cut, const ThreadRange range, KeyOf key_of, GridScratch* grid, u64* warps,
                              Visit visit) {
    u64 rank = 0;
    if (cut.ties) {
        u64 ties = 0, all;
        for (int i = range.begin; i < range.end; ++i) ties += key_of(i) == cut.key;
        rank = block_scan(ties, warps, all);
        if (threadIdx.x == 0) grid->blocks[blockIdx.x].ties = all;
        grid_barrier(&grid->barrier);
        u64 of_lower;
        block_scan(threadIdx.x < blockIdx.x ? grid->blocks[threadIdx.x].ties : 0, warps, of_lower);
        rank += of_lower;
    }
    for (int i = range.begin; i < range.end; ++i) {
        const u64 key = key_of(i);
        if (key > cut.key || (key == cut.key && rank++ < cut.ties)) visit(i);
    }
}

// Draw an id by inverse CDF in id order; the one thread that finds it commits it.
__device__ void draw(const Request& r, const double* scores, u64* weights, double peak, int size, int lo, int hi,
                     const Sequence& sequence, GridScratch* grid, SelectScratch& shared) {
    u64 own = 0, total, base;
    for (int i = lo + threadIdx.x; i < hi; i += THREADS)
        own += weights[i] = (u64)__double2ll_rn(exp((scores[i] - peak) / r.temperature) * kOne);
    block_scan(own, shared.warps, total);
    if (threadIdx.x == 0) grid->blocks[blockIdx.x].mass = total;
    grid_barrier(&grid->barrier);
    block_scan(threadIdx.x < gridDim.x ? grid->blocks[threadIdx.x].mass : 0, shared.warps, total);

    const auto key_of = [=](int i) { return ordered_key(scores[i]); };
    const auto mass_of = [=](int i) { return weights[i]; };
    Cutoff cut = {0, 0, total};
    if (r.top_k > 0 && r.top_k < size)
        cut = cutoff(key_of, mass_of, lo, hi, r.top_k, false, grid->histograms[0], &grid->barrier, shared);
    if (r.top_p < 1.0) {
        const u64 wanted = max(1ull, min(cut.mass, (u64)ceil(r.top_p * (double)cut.mass)));
        cut = cutoff(key_of, mass_of, lo, hi, wanted, true, grid->histograms[1], &grid->barrier, shared);
    }
    const ThreadRange range(lo, hi);
    const double min_weight = r.min_p * kOne;
    own = 0;
    for_each_kept(cut, range, key_of, grid, shared.warps, [&](int i) {
        if ((double)weights[i] < min_weight) weights[i] = 0;
        own += weights[i];
        weights[i] |= 1ull << 63;
    });
    const u64 before = block_scan(own, shared.warps, total);
    if (threadIdx.x == 0) grid->blocks[blockIdx.x].kept = total;
    grid_barrier(&grid->barrier);
    const u64 kept = threadIdx.x < gridDim.x ? grid->blocks[threadIdx.x].kept : 0;
    block_scan(threadIdx.x < blockIdx.x ? kept : 0, shared.warps, base);
    block_scan(kept, shared.warps, total);
    const u64 x = philox_word(r.seed, r.index) >> 8;
    const u64 at = __umul64hi(x, total) << 40 | x * total >> 24;  // ⌊u · total⌋
    u64 reached = base + before;
    if (at < reached || at >= reached + own) return;
    for (int i = range.begin; i < range.end; ++i) {
        if (!(weights[i] >> 63)) continue;
        reached += weights[i] & ~(1ull << 63);
        if (reached > at) {
            commit(sequence, i, grid->id);
            return;
        }
    }
}

// Log-probabilities of the raw logits: the committed token's, and the `count` highest in descending
// order.
__device__ void report(const Logits& row, double raw_best, int count, int lo, int hi, Drawn* drawn, GridScratch* grid,
                       SelectScratch& shared) {
    sum_slices(row.raw, row.size, raw_best, blockIdx.x, gridDim.x, grid->slice_sums);

    const float* const raw = row.raw;
    const auto key_of = [=](int i) { return ordered_key(raw[i]); };
    const auto no_mass = [](int) { return 0ull; };
    Cutoff cut = {0, 0, 0};
    if (count > 0 && count < row.size)
        cut = cutoff(key_of, no_mass, lo, hi, count, false, grid->histograms[2], &grid->barrier, shared);
    if (count > 0)
        for_each_kept(cut, ThreadRange(lo, hi), key_of, grid, shared.warps,
                      [&](int i) { grid->list[atomicAdd(&grid->listed, 1)] = i; });
    grid_barrier(&grid->barrier);
    if (blockIdx.x == 0)
        write_log_probabilities(row.raw, raw_best, count, grid->id, grid->list, grid->slice_sums, drawn);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(const float* logits, int size, const int* row_slots, const SlotArrays slots, Drawn* drawn, double* scores,
           u64* weights, GridScratch* grid) {
    __shared__ SelectScratch shared;
    __shared__ SequenceEnd end;
    const int wanted = row_slots ? row_slots[0] : 0, slot = max(wanted, 0);
    const Request r = slots.requests[slot];  // a copy: commit() advances the request
    Logits row(logits, slots, slot, size);
    const Sequence sequence(slots, slot, size, drawn, &end);
    load_end(end, slots, slot);
    const int position = slots.positions[slot];
    grid_dependency_wait();
    const bool draws = draws_in_launch(r, slots, 0);
    if (kMasked && !draws) return;  // `drawn` is the other launch's
    if (wanted < 0 || position < 0 || !draws) {  // the same in all blocks: commit() comes after all have started
        if (threadIdx.x == 0 && blockIdx.x == 0) drawn->id = kInactive;
        return;
    }
    if (kMasked) row.allowed = mask_of(slots, 0, size);
    const int t = threadIdx.x, each = (row.size + gridDim.x - 1) / gridDim.x;
    const int lo = min(row.size, (int)blockIdx.x * each), hi = min(row.size, lo + each);
    if (r.forced >= 0) {  // blocks that start later exit as well, whatever commit() has written
        __syncthreads();
        if (t == 0 && blockIdx.x == 0) commit(sequence, r.forced, grid->id);
        return;
    }
    u64* zeros = reinterpret_cast<u64*>(grid->histograms);
    const int bins = r.temperature > 0 || r.logprobs >= 0 ? sizeof(grid->histograms) / sizeof(u64) : 0;
    for (int i = blockIdx.x * THREADS + t; i < bins; i += gridDim.x * THREADS) zeros[i] = 0;
    if (t == 0 && blockIdx.x == 0) grid->listed = 0;
    const bool by_logit = !(r.temperature > 0) && !r.penalized && !row.specials.count;
    const Best mine = by_logit ? best_logit_in(row, r, lo, hi) : best_in(row, r, scores, lo, hi);
    if (t == 0) grid->blocks[blockIdx.x].best = mine;
    grid_barrier(&grid->barrier);

    const Best none = {-(double)kInfinity, -(double)kInfinity, -1, 0};
    const Best all = best_of(t < gridDim.x ? grid->blocks[t].best : none);
    const double peak = all.score, raw_best = all.raw;
    int id = all.id;
    if (all.broken || fabs(peak) == (double)kInfinity) id = -1;
    if (id >= 0 && r.temperature > 0) {
        draw(r, scores, weights, peak, row.size, lo, hi, sequence, grid, shared);
    } else if (t == 0 && blockIdx.x == 0) {
        commit(sequence, id, grid->id);
    }
    const int top = min(r.logprobs, min(TOP, row.size));
    if (r.logprobs >= 0) report(row, raw_best, top, lo, hi, sequence.drawn, grid, shared);
}
