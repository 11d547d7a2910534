// Sampling: rows of logits to one token each. Bias, penalties, masks, temperature, top-k, top-p,
// min-p, draw; log-probabilities.
//
//   w_i = exp((s_i - max s) / temperature); the first kept id with Σ_{j≤i} w_j > u · Σ w is drawn.
//   logprob_i = l_i - max l - log Σ exp(l - max l), of the raw logits l.
// Weights are integers of 2^-44: their sums are exact in any order. Scores are f64, as in the twin.
// u is Philox4x32-10 (Salmon et al., SC'11) of (seed, index). Ties go to the lower id. The f64 sum
// of the log-probabilities is the only sum whose order matters (slice_sums.cuh). So a row's draw
// depends neither on the grid nor on other rows.
//
// Scores and weights are computed from the logits wherever they are needed, so a row's memory is
// one RowExchange. Passes over the logits: 1 for the highest score; 1 for each histogram of a
// selection (select.cuh), mostly one; 1 for the sums of kept weights and the list of ids among
// which the selection ends. The last block to arrive ends the selection and draws: from the list,
// or from the ids of one warp, in which the cumulative weight is reached.
//
// Inputs: logits [R, V] f32; row_slots [R] i32 or null (row r is slot r); SlotArrays. Scratch:
// RowExchange [R], ticket [1] u32, zero.
// Outputs: drawn [R]; of each active slot the next token, position, index and counts.
// Grid (C, R), block THREADS; C ≤ LOGPROB_SLICES. Barriers of a row's blocks: none greedy, 1 with a
// temperature, 2 or more with top-k or top-p; log-probabilities 1 more, 2 or more with
// alternatives.
// Alignment: of the elements; 16 bytes of each row's logits are loaded at once if they are aligned.
// Twin: worker/cpu/sampler.py.
#include "pdl.cuh"
#include "select.cuh"
#include "slice_sums.cuh"

// The number below `total` at which the cumulative weights are cut: ⌊u · total⌋.
__device__ __forceinline__ u64 drawn_mass(u64 total) {
    const u64 x = task.random;
    return __umul64hi(x, total) << 40 | x * total >> 24;
}

__device__ __noinline__ void commit(int id) { commit(task.sequence, id, task.exchange->id); }

// Draw from the kept ids of a whole list.
__device__ void draw_from_list(Selection selection, bool top_p) {
    const int t = threadIdx.x;
    Rank mine = end_in_list(selection, true);
    const int listed = scratch.listed;
    if (top_p) {  // of the top k
        const u64 total = block_scan({mine.kept ? mine.weight : 0, 0}).all.mass;
        mine.kept &= mine.mass < top_p_of(total);
    }
    const u64 own = mine.kept ? above_min_p(mine.weight) : 0;
    scratch.masses[t] = own;
    const u64 at = drawn_mass(block_scan({own, 0}).all.mass);
    u64 reached = 0;
#pragma unroll 1
    for (int i = 0; i < listed; i += 4) {  // up to a multiple of 4, without masses
#pragma unroll
        for (int e = i; e < i + 4; ++e)
            if (scratch.places[e].id < mine.id) reached += scratch.masses[e];
    }
    if (reached <= at && at < reached + own) commit(mine.id);
}

// Draw from all ids up to scratch.last, whose weights are summed up by warp.
__device__ void draw_from_row() {
    const int t = threadIdx.x;
    const Place last = scratch.last;
    u64 own = 0;
    for (int b = 0; b < 4; ++b) own += scratch.sums[4 * t + b];
    const Scan warps = block_scan({own, 0});
    const u64 at = drawn_mass(warps.all.mass);
    u64 reached = warps.before.mass;
    if (reached <= at && at < reached + own) {
        int b = 4 * t;
        while (reached + scratch.sums[b] <= at) reached += scratch.sums[b++];
        scratch.first = b * task.each, scratch.mass = reached;
    }
    __syncthreads();
    const int end = min(task.row.size, scratch.first + task.each);
    reached = scratch.mass;
    for (int from = scratch.first; from < end && reached <= at; from += THREADS) {
        const int id = from + t;
        own = 0;
        if (id < end) {
            const double score = score_of(id, task.row.raw[id], task.row.marks[id >> 5] >> (id & 31) & 1);
            if (!last.before({ordered_key(score), id})) own = above_min_p(weight_of(score));
        }
        const Scan scan = block_scan({own, 0});
        const u64 before = reached + scan.before.mass;
        if (before <= at && at < before + own) commit(id);
        reached += scan.all.mass;
    }
}

// Draw an id by inverse CDF in id order. Returns whether this block ended the draw.
__device__ bool draw() {
    const Request& r = task.request;
    RowExchange* const exchange = task.exchange;
    const Scale scale = {task.peak, 32 * task.temperature, task.inverse / 32};
    const bool by_count = r.top_k > 0 && r.top_k < task.row.size, top_p = r.top_p < 1.0;
    bool whole = false, by_mass = top_p && !by_count;
    if (threadIdx.x == 0) {  // without a selection all ids are before the interval
        scratch.scale = {}, scratch.interval = {0, 0, 0, 0, kBuckets, 0, 0, 0, 0, 0}, scratch.last = {0, task.row.size};
    }
    if (by_count) {
        const Selection top_k = {false, false, top_p && r.top_k > THREADS / 2};
        select(top_k, r.top_k, scale);
        whole = complete();
        by_mass = top_p && !whole;
        if (by_mass) {
            list_ids(top_k, false);
            if (is_last_at_barrier()) {
                end_in_list(top_k, false);
                if (threadIdx.x == 0) exchange->target = top_p_of(scratch.mass), exchange->listed = 0;
                open_barrier();
            }
        }
    }
    const Selection selection = {false, by_mass, by_mass};
    if (by_mass) {
        select(selection, by_count ? exchange->target : 0, scale);
        whole = complete();
    }
    list_ids(selection, whole);
    if (!arrives_last(&exchange->drawn, task.shares)) return false;
    if (whole) {
        draw_from_list(selection, top_p && !by_mass);
    } else {
        end_in_list(selection, false);
        draw_from_row();
    }
    if (threadIdx.x == 0) exchange->listed = 0;
    return true;
}

// Log-probabilities of the raw logits: the committed token's, and the `count` highest in descending
// order. Returns whether this block wrote them.
__device__ bool report() {
    RowExchange* const exchange = task.exchange;
    const int count = min(task.request.logprobs, min(TOP, task.row.size));
    const Selection selection = {true, false, false};
    sum_slices(task.row.raw, task.row.size, task.raw_best, task.share, task.shares, exchange->slice_sums);
    if (count > 0) {
        select(selection, count, {task.raw_best, 64.0, 1 / 64.0});
        list_ids(selection, true);
    }
    if (!arrives_last(&exchange->ended, task.shares)) return false;
    Drawn* const drawn = task.sequence.drawn;
    const double log_sum = log_of_slices(exchange->slice_sums);
    const auto log_probability = [&](int id) { return task.row.raw[id] - task.raw_best - log_sum; };
    if (threadIdx.x == 0) drawn->count = count, drawn->logprob = exchange->id < 0 ? 0 : log_probability(exchange->id);
    if (count > 0) {
        const Rank mine = end_in_list(selection, true);
        if (mine.kept) drawn->top_ids[mine.count] = mine.id, drawn->top_logprobs[mine.count] = log_probability(mine.id);
        if (threadIdx.x == 0) exchange->listed = 0;
    }
    return true;
}

// The best of the row: returned if the row's blocks go on together, otherwise committed.
__device__ bool find_best() {
    RowExchange* const exchange = task.exchange;
    const Best mine = best_of_share();
    if (threadIdx.x == 0) exchange->bests[task.share] = mine;
    const bool greedy = !(task.request.temperature > 0), alone = greedy && task.request.logprobs < 0;
    if (alone) {
        if (!arrives_last(&exchange->ended, task.shares)) return false;
    } else {
        row_barrier();
    }
    const Best none = {-(double)kInfinity, -(double)kInfinity, -1, 0};
    const Best best = best_of((int)threadIdx.x < task.shares ? exchange->bests[threadIdx.x] : none);
    const bool broken = best.broken || fabs(best.score) == (double)kInfinity;
    if (threadIdx.x == 0) {
        task.peak = best.score, task.raw_best = best.raw;
        if ((broken || greedy) && (alone || task.share == 0)) commit(broken ? -1 : best.id);
    }
    __syncthreads();
    if (broken && !alone && arrives_last(&exchange->ended, task.shares) && threadIdx.x == 0) exchange->arrived = 0;
    return !broken && !alone;
}

extern "C" __global__ void __launch_bounds__(THREADS, ROW_BLOCKS)
    sample(const float* logits, int size, const int* row_slots, const SlotArrays slots, Drawn* drawn_rows,
                RowExchange* exchanges, unsigned int* ticket) {
    __shared__ int number;
    int row = blockIdx.y, share = blockIdx.x;
    if (gridDim.x > 1 && gridDim.y > 1) {
        if (threadIdx.x == 0) number = atomicInc(ticket, gridDim.x * gridDim.y - 1);
        __syncthreads();
        row = number / gridDim.x, share = number % gridDim.x;
    }
    const int wanted = row_slots ? row_slots[row] : row, slot = max(wanted, 0);
    Drawn* const drawn = drawn_rows + row;
    if (threadIdx.x == 0) {
        const int each = ((size + (int)gridDim.x - 1) / (int)gridDim.x + THREADS - 1) / THREADS * THREADS;
        task.request = slots.requests[slot];
        task.row = Logits(logits + (size_t)row * size, slots, slot, size);
        if (kMasked) task.row.allowed = mask_of(slots, row, size);
        task.sequence = Sequence(slots, slot, size, drawn, &task.end);
        task.exchange = exchanges + row;
        task.share = share, task.shares = gridDim.x;
        task.lo = min(size, share * each), task.hi = min(size, task.lo + each);
        task.each = each / kWarps, task.levels = 0, task.arrived = 0;
        task.penalized = task.request.penalized;
    } else if (threadIdx.x == 32) {
        const Request& r = slots.requests[slot];
        task.temperature = fmax(r.temperature, 1e-290);  // scores are equal or further apart than 33e-290
        task.inverse = __ddiv_rn(1.0, task.temperature), task.min_weight = r.min_p * kOne;
        task.random = philox_word(r.seed, r.index) >> 8;
    }
    load_end(task.end, slots, slot);
    const int position = slots.positions[slot];
    __syncthreads();
    grid_dependency_wait();
    const bool draws = draws_in_launch(task.request, slots, row);
    if (kMasked && !draws) return;  // `drawn` is the other launch's
    if (wanted < 0 || position < 0 || !draws) {  // the same in all blocks of the row, or another one was forced
        if (threadIdx.x == 0 && share == 0) drawn->id = kInactive;
        return;
    }
    if (task.request.forced >= 0) {
        if (threadIdx.x == 0 && share == 0) commit(task.request.forced);
        return;
    }
    if (!find_best()) return;
    bool last = false;
    if (task.request.temperature > 0) last = draw();
    if (task.request.logprobs >= 0) last = report();
    if (last && task.levels) clear(task.exchange->histograms[(task.levels + 1) % 2]);
    if (last && threadIdx.x == 0) task.exchange->arrived = 0;
}
