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
// Scores and weights are computed from the logits wherever they are needed, so a row's memory is one
// RowBoard. Passes over the logits: 1 for the highest score; 1 for each histogram of a selection
// (select.cuh), mostly one; 1 for the sums of kept weights and the list of ids among which the
// selection ends. The last block to arrive ends the selection and draws: from the list, or from the
// ids of one warp, in which the cumulative weight is reached.
//
// Inputs: logits [R, V] f32; row_slots [R] i32 or null (row r is slot r); SlotArrays. Scratch:
// RowBoard [R], ticket [1] u32, zero.
// Outputs: drawn [R]; of each active slot the next token, position, index and counts.
// Grid (C, R), block THREADS; C ≤ LOGPROB_SLICES. Meetings of a row's blocks: none greedy, 1 with a
// temperature, 2 or more with top-k or top-p; log-probabilities 1 more, 2 or more with alternatives.
// Alignment: of the elements; 16 bytes of each row's logits are loaded at once if they are aligned.
// Twin: worker/cpu/sampler.py.
#include "pdl.cuh"
#include "select.cuh"
#include "slice_sums.cuh"

// The number below `total` at which the cumulative weights are cut: ⌊u · total⌋.
__device__ __forceinline__ u64 drawn_mass(const Request& r, u64 total) {
    const u64 x = philox_word(r.seed, r.index) >> 8;
    return __umul64hi(x, total) << 40 | x * total >> 24;
}

// Draw from the kept ids of a whole list; `mine` is this thread's.
__device__ void draw_from_list(const RowTask& task, RowScratch& scratch, Selection<false>::Rank mine, bool top_p) {
    const int t = threadIdx.x, listed = scratch.listed;
    u64 total;
    if (top_p) {  // of the top k
        block_scan(mine.kept ? mine.weight : 0, scratch.warps, total);
        mine.kept &= mine.mass < top_p_of(task, total);
    }
    const u64 own = mine.kept ? above_min_p(task, mine.weight) : 0;
    __syncthreads();
    scratch.masses[t] = own;
    block_scan(own, scratch.warps, total);
    const u64 at = drawn_mass(task.request, total);
    u64 reached = 0;
    for (int i = 0; i < listed; ++i)
        if (scratch.ids[i] < mine.id) reached += scratch.masses[i];
    if (reached <= at && at < reached + own) commit(task.sequence, mine.id, task.board->id);
}

// Draw from all ids up to scratch.last, of which `n` are listed and the others summed up by warp.
__device__ void draw_from_row(const RowTask& task, RowScratch& scratch, const Selection<false>& selection, int n) {
    const int t = threadIdx.x;
    const Place last = scratch.last;
    const auto kept = [&](double score, int id, u64 weight) {
        return last.before({ordered_key(score), id}) ? 0 : above_min_p(task, weight);
    };
    u64 own = 0, total, reached;
    for (int i = t; i < kBuckets; i += THREADS) scratch.sums[i] = i < task.shares * kWarps ? task.board->sums[i] : 0;
    __syncthreads();
    selection.for_each_listed(n, true, [&](int id, double score, u64 weight) {
        const u64 mine = kept(score, id, weight);
        if (mine) add_shared(&scratch.sums[id / task.each], mine);
    });
    __syncthreads();
    for (int b = 0; b < 4; ++b) own += scratch.sums[4 * t + b];
    reached = block_scan(own, scratch.warps, total);
    const u64 at = drawn_mass(task.request, total);
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
            const double score = score_of(task, id, task.row.raw[id], task.row.marks[id >> 5] >> (id & 31) & 1);
            own = kept(score, id, weight_of(task, score));
        }
        const u64 before = reached + block_scan(own, scratch.warps, total);
        if (before <= at && at < before + own) commit(task.sequence, id, task.board->id);
        reached += total;
    }
}

// Draw an id by inverse CDF in id order. Returns whether this block ended the draw.
__device__ bool draw(RowTask& task, RowScratch& scratch) {
    const Request& r = task.request;
    RowBoard* const board = task.board;
    const double range = 32.0 * r.temperature;
    bool by_count = r.top_k > 0 && r.top_k < task.row.size, whole = false;
    const bool top_p = r.top_p < 1.0;
    if (threadIdx.x == 0) {  // without a selection all ids are before the interval
        scratch.scale = {}, scratch.interval = {0, 0, 0, 0, kBuckets, 0, 0, 0, 0}, scratch.last = {0, task.row.size};
    }
    if (by_count) {
        const Selection<false> top_k = {task, scratch, false, top_p && r.top_k > THREADS / 2};
        top_k.run(r.top_k, task.peak, range);
        whole = top_k.complete();
        if (top_p && !whole) {
            top_k.list(false);
            meet(task, [&] {
                top_k.end_in_list(false);
                if (threadIdx.x == 0) board->target = top_p_of(task, scratch.mass), board->listed = 0;
            });
            by_count = false;
        }
    }
    const bool by_mass = top_p && !by_count;
    const Selection<false> selection = {task, scratch, by_mass, by_mass};
    if (by_mass) {
        selection.run(r.top_k > 0 && r.top_k < task.row.size ? board->target : 0, task.peak, range);
        whole = selection.complete();
    }
    __syncthreads();
    selection.list(whole);
    if (!arrives_last(&board->draws, task.shares)) return false;
    const int listed = (int)scratch.interval.count;
    if (whole) {
        draw_from_list(task, scratch, selection.end_in_list(true), top_p && by_count);
    } else {
        if (listed) selection.end_in_list(false);
        draw_from_row(task, scratch, selection, listed);
    }
    if (threadIdx.x == 0) board->listed = 0;
    return true;
}

// Log-probabilities of the raw logits: the committed token's, and the `count` highest in descending
// order. Returns whether this block wrote them.
__device__ bool report(RowTask& task, RowScratch& scratch) {
    RowBoard* const board = task.board;
    const int count = min(task.request.logprobs, min(TOP, task.row.size));
    const Selection<true> selection = {task, scratch, false, false};
    sum_slices(task.row.raw, task.row.size, task.raw_best, task.share, task.shares, board->slice_sums);
    if (count > 0) {
        selection.run(count, task.raw_best, 64.0);
        selection.list(true);
    }
    if (!arrives_last(&board->barrier.arrived, task.shares)) return false;
    Drawn* const drawn = task.sequence.drawn;
    const double log_sum = log_of_slices(board->slice_sums);
    const auto log_probability = [&](int id) { return task.row.raw[id] - task.raw_best - log_sum; };
    if (threadIdx.x == 0) drawn->count = count, drawn->logprob = board->id < 0 ? 0 : log_probability(board->id);
    if (count > 0) {
        const Selection<true>::Rank mine = selection.end_in_list(true);
        if (mine.kept) drawn->top_ids[mine.count] = mine.id, drawn->top_logprobs[mine.count] = log_probability(mine.id);
        if (threadIdx.x == 0) board->listed = 0;
    }
    return true;
}

// The best of the row: returned if the row's blocks go on together, otherwise committed.
__device__ bool find_best(RowTask& task) {
    RowBoard* const board = task.board;
    const Best mine = best_of_share(task);
    if (threadIdx.x == 0) board->bests[task.share] = mine;
    const bool greedy = !(task.request.temperature > 0), alone = greedy && task.request.logprobs < 0;
    if (alone) {
        if (!arrives_last(&board->barrier.arrived, task.shares)) return false;
    } else {
        meet(task, [] {});
    }
    const Best none = {-(double)kInfinity, -(double)kInfinity, -1, 0};
    const Best best = best_of((int)threadIdx.x < task.shares ? board->bests[threadIdx.x] : none);
    const bool broken = best.broken || fabs(best.score) == (double)kInfinity;
    if (threadIdx.x == 0) {
        task.peak = best.score, task.raw_best = best.raw, task.min_weight = task.request.min_p * kOne;
        task.inverse = __ddiv_rn(1.0, task.request.temperature);
        if ((broken || greedy) && (alone || task.share == 0)) commit(task.sequence, broken ? -1 : best.id, board->id);
    }
    __syncthreads();
    return !broken && !alone;
}

extern "C" __global__ void __launch_bounds__(THREADS, ROW_BLOCKS)
    sample(const float* logits, int size, const int* row_slots, const SlotArrays slots, Drawn* drawn_rows,
                RowBoard* boards, unsigned int* ticket) {
    __shared__ RowScratch scratch;
    __shared__ RowTask task;
    __shared__ int taken;
    if (threadIdx.x == 0) taken = gridDim.x == 1 ? blockIdx.y : atomicInc(ticket, gridDim.x * gridDim.y - 1);
    __syncthreads();
    const int row = taken / gridDim.x, share = taken % gridDim.x;
    const int wanted = row_slots ? row_slots[row] : row, slot = max(wanted, 0);
    Drawn* const drawn = drawn_rows + row;
    if (threadIdx.x == 0) {
        const int each = ((size + (int)gridDim.x - 1) / (int)gridDim.x + 4 * kWarps - 1) / (4 * kWarps) * 4 * kWarps;
        task.request = slots.requests[slot];
        // Scores are equal or further apart than 33e-290.
        if (task.request.temperature > 0) task.request.temperature = fmax(task.request.temperature, 1e-290);
        task.row = Logits(logits + (size_t)row * size, slots, slot, size);
        if (kMasked) task.row.allowed = mask_of(slots, row, size);
        task.sequence = Sequence(slots, slot, size, drawn, &task.end);
        task.board = boards + row;
        task.share = share, task.shares = gridDim.x;
        task.lo = min(size, share * each), task.hi = min(size, task.lo + each);
        task.each = each / kWarps, task.levels = 0;
        task.penalized = task.request.penalized;
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
        if (threadIdx.x == 0 && share == 0) commit(task.sequence, task.request.forced, task.board->id);
        return;
    }
    if (threadIdx.x == 0) task.generation = __ldcg(&task.board->barrier.generation);
    if (!find_best(task)) return;
    bool last = false;
    if (task.request.temperature > 0) last = draw(task, scratch);
    if (task.request.logprobs >= 0) last = report(task, scratch);
    if (last && task.levels) clear(task.board->histograms[(task.levels + 1) % 2]);
}
