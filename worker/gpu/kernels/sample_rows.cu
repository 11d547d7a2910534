// Sampling of several rows in one launch: sample.cu's draws, bit by bit, for R rows of R slots.
//
// Scores and weights are computed from the logits wherever they are needed, so a row's memory is one
// RowBoard. A greedy row reads its logits once and its last block to arrive commits; a row with a
// temperature reads them again for the weights' sum, and once more for each of top-k and top-p (and
// for every refinement, row_select.cuh). Sums are integers, but for the log-probabilities', whose
// order is that of sample.cu.
//
// Inputs: logits [R, V] f32; row_slots [R] i32 or null (row r is slot r); SlotArrays. Scratch:
// RowBoard [R], ticket [1] u32, zero.
// Outputs: drawn [R]; of each active slot the next token, position, index and counts.
// Grid (C, R), block THREADS; C ≤ LOGPROB_SLICES. Meetings of a row's blocks: 1 greedy, 2 plain, 1
// to 3 more for each of top-k and top-p, 2 or more for log-probabilities.
// Alignment: of the elements; 16 bytes of each row's logits are loaded at once if they are aligned.
// Twin: worker/cpu/sampler.py.
#include "pdl.cuh"
#include "row_select.cuh"

// Log-probability sums of slices of the vocabulary: see sample.cu.
#include "slice_sums.cuh"

// Which of the ids of a quad are kept, with the ranks of equal keys in id order. `rank`: the number
// of equal keys before the quads of this warp, advanced by them. Called by whole warps.
template <typename Value>
__device__ __forceinline__ unsigned int kept_of(const RowTask& task, const Quad& q, Value value, u64& rank,
                                                double (&values)[4]) {
    unsigned int kept = 0, tied = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (e >= q.count) continue;
        values[e] = value(q.id + e, q.raw[e], q.marks() >> e & 1);
        const u64 key = ordered_key(values[e]);
        kept |= (unsigned int)(key > task.cut.key) << e;
        tied |= (unsigned int)(key == task.cut.key) << e;
    }
    if (!task.cut.ties || !__any_sync(0xffffffffu, tied)) return kept;
    const int own = __popc(tied), lane = threadIdx.x % 32;
    int up_to = own;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, up_to, step);
        if (lane >= step) up_to += other;
    }
    u64 at = rank + up_to - own;
    rank += __shfl_sync(0xffffffffu, up_to, 31);
    for (int e = 0; e < 4; ++e)
        if (tied >> e & 1 && at++ < task.cut.ties) kept |= 1u << e;
    return kept;
}

// The number of equal keys before this lane's tile.
template <typename Value>
__device__ u64 ties_before(const RowTask& task, const Tiles& tiles, Value value, u64* warps) {
    if (!task.cut.ties) return 0;
    const u64 own = sum_by_tile(task, tiles, [&](int, const Quad& q) {
        u64 ties = 0;
        for (int e = 0; e < 4; ++e)
            if (e < q.count) ties += ordered_key(value(q.id + e, q.raw[e], q.marks() >> e & 1)) == task.cut.key;
        return ties;
    });
    u64 share, all;
    const u64 before = block_scan(own, warps, share);
    if (threadIdx.x == 0) task.board->shares[task.share].ties = share;
    meet(task, [] {});
    return before + over_shares(task, &ShareResult::ties, warps, all);
}

// The weights of a quad's kept ids.
__device__ __forceinline__ u64 kept_weights(const RowTask& task, const Quad& q, u64& rank, u64 (&weights)[4]) {
    double values[4];
    const auto value = [&](int id, float raw, unsigned int mark) { return score_of(task, id, raw, mark); };
    const unsigned int kept = kept_of(task, q, value, rank, values);
    u64 sum = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        weights[e] = kept >> e & 1 ? weight_of(&task, values[e]) : 0;
        if ((double)weights[e] < task.min_weight) weights[e] = 0;
        sum += weights[e];
    }
    return sum;
}

// Find the id at which the kept weights of one tile, after `reached`, exceed `at`, and commit it.
// Called by a whole warp.
__device__ void commit_in_tile(const RowTask& task, const Tiles& tiles, int tile, u64 rank,
                               u64 reached, u64 at) {
    const int lane = threadIdx.x % 32, hi = min(tiles.hi, tiles.lo + (tile + 1) * tiles.size);
    for (int from = tiles.lo + tile * tiles.size; from < hi; from += 128) {
        u64 weights[4];
        const Quad q = load_quad(task.row, from + 4 * lane, tiles.hi);
        const u64 own = kept_weights(task, q, rank, weights);
        u64 up_to = own;
        for (int step = 1; step < 32; step *= 2) {
            const u64 other = __shfl_up_sync(0xffffffffu, up_to, step);
            if (lane >= step) up_to += other;
        }
        u64 sum = reached + up_to - own;
        if (sum <= at && at < sum + own) {
            int e = 0;
            while ((sum += weights[e]) <= at) ++e;
            commit(task.sequence, q.id + e, task.board->id);
        }
        reached += __shfl_sync(0xffffffffu, up_to, 31);
        if (reached > at) return;
    }
}

// Draw an id by inverse CDF in id order.
__device__ void draw(RowTask& task, RowScratch& scratch) {
    const Request& r = task.request;
    RowBoard* const board = task.board;
    const auto value = [&](int id, float raw, unsigned int mark) { return score_of(task, id, raw, mark); };
    const auto mass = [&](double score) { return weight_of(&task, score); };
    const auto wanted = [&](u64 total) { return max(1ull, min(total, (u64)ceil(r.top_p * (double)total))); };
    const bool by_count = r.top_k > 0 && r.top_k < task.row.size, by_mass = r.top_p < 1.0;
    for (int pass = by_count ? 0 : 1; pass < (by_mass ? 2 : 1); ++pass) {  // top-k, then top-p
        const Selection<decltype(value), decltype(mass)> selection = {task, scratch, value, mass, by_mass,
                                                                      pass == 1};
        const u64 target = pass == 0 ? (u64)r.top_k : by_count ? wanted(task.cut.mass) : 0;
        selection.run(Scale(task.peak, 32.0 * r.temperature), &board->weights, pass == 1 && by_count, target, wanted,
                      false);
    }
    const Tiles tiles(task);
    const u64 ties = ties_before(task, tiles, value, scratch.warps);
    u64 rank = 0;
    int tile_of_rank = -1;
    const u64 own = sum_by_tile(task, tiles, [&](int tile, const Quad& q) {
        if (tile != tile_of_rank && task.cut.ties) rank = __shfl_sync(0xffffffffu, ties, tile), tile_of_rank = tile;
        u64 weights[4];
        return kept_weights(task, q, rank, weights);
    });
    u64 total;
    const u64 before = block_scan(own, scratch.warps, total);
    if (threadIdx.x == 0) board->shares[task.share].kept = total;
    meet(task, [&] {
        if (by_count || by_mass)
            clear(board->weights);
    });
    const u64 reached = over_shares(task, &ShareResult::kept, scratch.warps, total) + before;
    const u64 x = philox_word(r.seed, r.index) >> 8;
    const u64 at = __umul64hi(x, total) << 40 | x * total >> 24;  // ⌊u · total⌋
    const unsigned int found = __ballot_sync(0xffffffffu, reached <= at && at < reached + own);
    if (!found) return;
    const int tile = __ffs(found) - 1;
    commit_in_tile(task, tiles, tile, __shfl_sync(0xffffffffu, ties, tile),
                   __shfl_sync(0xffffffffu, reached, tile), at);
}

// Log-probabilities of the raw logits: the committed token's, and the `count` highest in descending
// order.
__device__ void report(RowTask& task, RowScratch& scratch) {
    RowBoard* const board = task.board;
    const double raw_best = board->best.raw;
    const int count = min(task.request.logprobs, min(TOP, task.row.size));
    sum_slices(task.row.raw, task.row.size, raw_best, task.share, task.shares, board->slice_sums);
    const auto value = [](int, float raw, unsigned int) { return (double)raw; };
    const auto no_mass = [](double) { return 0ull; };
    __syncthreads();
    if (threadIdx.x == 0) task.cut = {0, 0, 0};
    __syncthreads();
    if (count > 0 && count < task.row.size) {
        const Selection<decltype(value), decltype(no_mass)> selection = {
            task, scratch, value, no_mass, false, false};
        selection.run(Scale(raw_best, 64.0), &board->other, false, count, [](u64) { return 0ull; }, true);
    }
    if (count > 0) {
        const Tiles tiles(task);
        const u64 ties = ties_before(task, tiles, value, scratch.warps);
        u64 rank = 0;
        int tile_of_rank = -1;
        sum_by_tile(task, tiles, [&](int tile, const Quad& q) {
            if (tile != tile_of_rank && task.cut.ties) rank = __shfl_sync(0xffffffffu, ties, tile), tile_of_rank = tile;
            double values[4];
            const unsigned int kept = kept_of(task, q, value, rank, values);
            for (int e = 0; e < 4; ++e)
                if (kept >> e & 1) board->top[atomicAdd(&board->top_listed, 1)] = q.id + e;
            return 0ull;
        });
    }
    meet(task, [&] {
        write_log_probabilities(task.row.raw, raw_best, count, board->id, board->top, board->slice_sums,
                                task.sequence.drawn);
        if (threadIdx.x == 0) board->top_listed = 0;
    });
}

// The best of the row: returned if the row's blocks go on together, otherwise committed.
__device__ bool find_best(RowTask& task) {
    RowBoard* const board = task.board;
    const Best mine = best_of_share(task);
    if (threadIdx.x == 0) board->shares[task.share].best = mine;
    const bool greedy = !(task.request.temperature > 0), alone = greedy && task.request.logprobs < 0;
    const auto combine = [&] {
        const Best none = {-(double)kInfinity, -(double)kInfinity, -1, 0};
        const Best all = best_of((int)threadIdx.x < task.shares ? board->shares[threadIdx.x].best : none);
        const bool broken = all.broken || fabs(all.score) == (double)kInfinity;
        if (threadIdx.x) return;
        board->best = all;
        board->best.broken = broken;
        if (broken || greedy) commit(task.sequence, broken ? -1 : all.id, board->id);
    };
    if (alone) {
        if (arrives_last(&board->barrier.arrived, task.shares)) combine();
        return false;
    }
    meet(task, combine);
    if (threadIdx.x == 0)
        task.peak = board->best.score, task.min_weight = task.request.min_p * kOne, task.cut = {0, 0, 0};
    __syncthreads();
    return !board->best.broken;
}

extern "C" __global__ void __launch_bounds__(THREADS, ROW_BLOCKS)
    sample_rows(const float* logits, int size, const int* row_slots, const SlotArrays slots, Drawn* drawn_rows,
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
        const int each = ((size + (int)gridDim.x - 1) / (int)gridDim.x + 3) / 4 * 4;
        task.request = slots.requests[slot];
        task.row = Logits(logits + (size_t)row * size, slots, slot, size);
        if (kMasked) task.row.allowed = mask_of(slots, row, size);
        task.sequence = Sequence(slots, slot, size, drawn, &task.end);
        task.board = boards + row;
        task.share = share, task.shares = gridDim.x;
        task.lo = min(size, share * each), task.hi = min(size, task.lo + each);
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
    if (!find_best(task)) return;
    if (task.request.temperature > 0) draw(task, scratch);
    if (task.request.logprobs >= 0) report(task, scratch);
}
