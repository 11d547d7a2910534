// Attention of heads of 512 elements, in both phases, on CUDA cores.
//
//   y_h = Σ_p softmax_p(q_h · k_p / √512) v_p   over positions max(0, t-window+1) … t
// A sink logit, if any, joins the denominator.
// A block computes GROUP ≤ 4 query heads of one KV head for one row. Positions pass in tiles of 128
// at absolute multiples of 128: each warp computes the scores of one KV block, one warp a head the
// online softmax in base 2, then each thread two columns of the sums. The order of all sums follows
// from the row's position alone.
//
// attention_512_rows (decode): one new token a row. With Norms (HeadNorms) norms of q, k and v;
// RoPE of q and k, KV write, and the split of attention_decode.cu: block g of a row computes the
// tiles g, g + splits, … from the oldest on; the block that arrives last adds the results.
//   q [R, H·512], k, v [R, Hk·512] f32, or null: they are in the cache, by an earlier layer or,
//   always with Q8Kv, by kv_rows.cu; row_slots [R] i32, or null: slot 0; of the slots, positions
//   [S] i32 and tables [S, table_stride] i32. y [R, H·512] f32; zeros for an inactive row
//   (attention_items.cu). The keys of other rows of a sequence are in the cache (kv_rows.cu).
//   Grid (stored, H/GROUP, R), stored ≤ splits: those that the longest context can need.
//   Scratch: partials, R·(H/GROUP)·stored times 514·GROUP f32; arrivals, R·(H/GROUP) u32, zero
//   before and after each launch.
// attention_512_chunk (prefill): the rows of a batch (prefill_batch.cuh), after rope_kv.cu.
//   q [T, H·512] f16, rotated. y [T, H·512] f16, order of fragments.cuh; zeros between chunks.
//   Grid (H/GROUP, T); blocks of rows after the last chunk exit.
// Both: caches as in kv_cache.cuh; sinks [H] f32 or null. Block 256. Alignment: 16 bytes. Bytes:
// the visible keys and values once a row and GROUP heads, mostly from L2, after the wait.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache.
#include "arrival.cuh"
#include "decode_splits.cuh"
#include "fragments.cuh"
#include "half.cuh"
#include "head_norm.cuh"
#include "pdl.cuh"
#include "prefill_batch.cuh"
#include "rope.cuh"
#include "warp.cuh"

constexpr int kDim = 512, kThreads = 256, kTile = kThreads / 32 * kKvBlock;
constexpr float kLog2e = 1.4426950408889634f;

template <class Kv>
struct Caches {
    const typename Kv::Element *keys, *values;
    const int* table;
    int n_kv_heads, kv_head;
    __device__ __forceinline__ size_t row(int block, int position) const {
        return Kv::template row<kDim>(block, n_kv_heads, kv_head, position);
    }
};

template <int GROUP>
struct Shared {
    float4 weights[kTile];  // of a position: its scores, then weights, of the heads
    float queries[GROUP][kDim], factors[GROUP];
    __align__(16) unsigned short key[kDim], value[kDim];  // of the newest position, in f16
    int blocks[kTile / kKvBlock];
    __device__ __forceinline__ float& weight(int i, int g) { return reinterpret_cast<float*>(weights)[4 * i + g]; }
};

template <int GROUP>
struct State {
    float q[GROUP][16];       // elements 8·lane … and 256 + 8·lane … of each head
    float sums[GROUP][2];     // of columns 2·thread and 2·thread + 1
    float peak, total;        // of head `warp`

    __device__ __forceinline__ void start(const Shared<GROUP>& shared) {
        const int lane = threadIdx.x % 32;
        peak = -kInfinity, total = 0.f;
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            sums[g][0] = sums[g][1] = 0.f;
#pragma unroll
            for (int i = 0; i < 16; ++i) q[g][i] = shared.queries[g][i / 8 * 256 + 8 * lane + i % 8];
        }
    }

    // Add one tile, of which at least one position is visible. The newest row of keys and values is
    // in `shared` if `own`.
    template <class Kv>
    __device__ __forceinline__ void add(Shared<GROUP>& shared, const Caches<Kv>& caches, int tile, int oldest,
                                        int newest, bool own) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, start = tile * kTile + warp * kKvBlock;
        const int block = start <= newest ? caches.table[start / kKvBlock] : 0;
        if (lane == 0) shared.blocks[warp] = block;
#pragma unroll 1
        for (int first = start; first < start + kKvBlock; first += 8) {
            float dots[32];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int p = first + i;
                float low[8] = {}, high[8] = {};
                if (p >= oldest && p <= newest) {
                    const typename Kv::Element* row;
                    if constexpr (Kv::kQuantized) row = caches.keys + caches.row(block, p);
                    else row = own && p == newest ? shared.key : caches.keys + caches.row(block, p);
                    const float scale = Kv::template row_scale<kDim>(row, p);
                    Kv::load_eight(row + 8 * lane, scale, low);
                    Kv::load_eight(row + 256 + 8 * lane, scale, high);
                }
#pragma unroll
                for (int g = 0; g < 4; ++g) {
                    dots[4 * i + g] = 0.f;
                    if (g >= GROUP) continue;
#pragma unroll
                    for (int e = 0; e < 8; ++e)
                        dots[4 * i + g] = fmaf(q[g][8 + e], high[e], fmaf(q[g][e], low[e], dots[4 * i + g]));
                }
            }
            const int p = first + lane / 4;
            const float score = transposed_sum(dots);
            shared.weight(p % kTile, lane % 4) = p >= oldest && p <= newest ? score : -kInfinity;
        }
        __syncthreads();
        if (warp < GROUP) weigh(shared, warp, lane);
        __syncthreads();
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            sums[g][0] = __fmul_rn(sums[g][0], shared.factors[g]);
            sums[g][1] = __fmul_rn(sums[g][1], shared.factors[g]);
        }
        const int last = min(newest, tile * kTile + kTile - 1);
#pragma unroll 4
        for (int p = max(oldest, tile * kTile); p <= last; ++p) {
            const int i = p % kTile;
            const typename Kv::Element* row;
            if constexpr (Kv::kQuantized) row = caches.values + caches.row(shared.blocks[i / kKvBlock], p);
            else row = own && p == newest ? shared.value : caches.values + caches.row(shared.blocks[i / kKvBlock], p);
            add_row(Kv::load_two(row + 2 * threadIdx.x, Kv::template row_scale<kDim>(row, p)), shared.weights[i]);
        }
        __syncthreads();
    }

    __device__ __forceinline__ void add_row(const float2 v, const float4 weights) {
        const float w[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
        for (int g = 0; g < GROUP; ++g) sums[g][0] = fmaf(w[g], v.x, sums[g][0]), sums[g][1] = fmaf(w[g], v.y, sums[g][1]);
    }

    // The factors of the heads' sums, which normalize them: what a total and a sink give.
    __device__ __forceinline__ static float normalizer(float peak, float total, const float* sinks, int g) {
        return __fdiv_rn(1.f, sinks ? __fadd_rn(total, exp2f(fmaf(sinks[g], kLog2e, -peak))) : total);
    }
    __device__ __forceinline__ void normalize(Shared<GROUP>& shared, const float* sinks) {
        const int warp = threadIdx.x / 32;
        if (warp < GROUP && threadIdx.x % 32 == 0) shared.factors[warp] = normalizer(peak, total, sinks, warp);
        __syncthreads();
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            sums[g][0] = __fmul_rn(sums[g][0], shared.factors[g]);
            sums[g][1] = __fmul_rn(sums[g][1], shared.factors[g]);
        }
    }

private:
    // Replace the scores of head g by weights.
    __device__ __forceinline__ void weigh(Shared<GROUP>& shared, int g, int lane) {
        float w[kTile / 32], highest = peak, added = 0.f;
#pragma unroll
        for (int j = 0; j < kTile / 32; ++j) w[j] = shared.weight(lane + 32 * j, g), highest = fmaxf(highest, w[j]);
        highest = warp_max(highest);
#pragma unroll
        for (int j = 0; j < kTile / 32; ++j) {
            w[j] = exp2f(__fsub_rn(w[j], highest)), added = __fadd_rn(added, w[j]);
            shared.weight(lane + 32 * j, g) = w[j];
        }
        const float factor = exp2f(__fsub_rn(peak, highest));
        total = fmaf(total, factor, warp_sum(added)), peak = highest;
        if (lane == 0) shared.factors[g] = factor;
    }
};

template <int GROUP, class Kv, class... Norms>
__global__ void __launch_bounds__(kThreads)
    attention_512_rows(float* y, const float* q, const float* k, const float* v, typename Kv::Element* k_cache,
                       typename Kv::Element* v_cache, const float* cos, const float* sin, int dims, const int* row_slots,
                       const int* positions, const int* tables, int table_stride, const float* sinks, float* partials,
                       unsigned int* arrivals, int n_heads, int n_kv_heads, int window, int splits,
                       Norms... norms) {
    constexpr int kPartial = GROUP * (kDim + 2);
    __shared__ Shared<GROUP> shared;
    grid_dependency_wait();
    const int group = blockIdx.y, head = group * GROUP, kv_head = head / (n_heads / n_kv_heads);
    const int slot = row_slots ? row_slots[blockIdx.z] : 0, column = 2 * threadIdx.x;
    const int position = slot < 0 ? -1 : positions[slot];
    float* const out = y + ((size_t)blockIdx.z * n_heads + head) * kDim + column;
    const auto store = [=](int g, float2 sum) { *reinterpret_cast<float2*>(out + g * kDim) = sum; };
    if (position < 0 || position >= table_stride * kKvBlock) {
        for (int g = 0; g < GROUP && blockIdx.x == 0; ++g) store(g, make_float2(0.f, 0.f));
        return;
    }
    const SplitTiles tiles(position, window, kTile, splits, blockIdx.x);
    const int active = tiles.active();
    if (tiles.mine >= active) return;
    const Caches<Kv> caches = {k_cache, v_cache, tables + (size_t)slot * table_stride, n_kv_heads, kv_head};

    const RopeTables rope = {cos, sin, dims};
    const float scale = __fmul_rn(rsqrtf((float)kDim), kLog2e);
    const size_t kv_row = ((size_t)blockIdx.z * n_kv_heads + kv_head) * kDim;
    const bool own = !Kv::kQuantized && k && tiles.has_newest();  // without k, the newest row is read from the cache
    q += ((size_t)blockIdx.z * n_heads + head) * kDim, k += kv_row, v += kv_row;
    if constexpr (sizeof...(Norms) > 0) {
        __shared__ __align__(16) float heads[GROUP + 2][kDim];
        NormedGroup<kDim, GROUP, kThreads / 32> normed;
        normed.load_weights(own, norms...);
        normed.normalize(own, q, k, v, heads[0], norms...);
        q = heads[0], k = heads[normed.kKey], v = heads[normed.kValue];
    }
#pragma unroll 1
    for (int unit = threadIdx.x; unit < (GROUP + own) * kDim / 4; unit += kThreads) {
        const int g = unit / (kDim / 4), e = unit % (kDim / 4) * 4;
        const float4 x = rotated<false>(g < GROUP ? q + g * kDim : k, e, position, rope);
        if (g < GROUP) {
            *reinterpret_cast<float4*>(&shared.queries[g][e]) =
                make_float4(__fmul_rn(x.x, scale), __fmul_rn(x.y, scale), __fmul_rn(x.z, scale), __fmul_rn(x.w, scale));
            continue;
        }
        if constexpr (!Kv::kQuantized) {
            const size_t to = caches.row(caches.table[position / kKvBlock], position) + e;
            const uint2 key = halves_of(x), value = halves_of(*reinterpret_cast<const float4*>(v + e));
            *reinterpret_cast<uint2*>(k_cache + to) = *reinterpret_cast<uint2*>(shared.key + e) = key;
            *reinterpret_cast<uint2*>(v_cache + to) = *reinterpret_cast<uint2*>(shared.value + e) = value;
        }
    }
    __syncthreads();

    State<GROUP> state;
    state.start(shared);
    for (int tile = tiles.mine; tile < tiles.tiles; tile += splits)
        state.add(shared, caches, tiles.first + tile, tiles.oldest, position, own);
    if (sinks) sinks += head;
    if (active == 1) {
        state.normalize(shared, sinks);
        for (int g = 0; g < GROUP; ++g) store(g, make_float2(state.sums[g][0], state.sums[g][1]));
        return;
    }
    const int row = blockIdx.z * gridDim.y + group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    partials += (size_t)row * gridDim.x * kPartial;
    float* const mine = partials + tiles.mine * kPartial;
#pragma unroll
    for (int g = 0; g < GROUP; ++g)
        *reinterpret_cast<float2*>(mine + g * kDim + column) = make_float2(state.sums[g][0], state.sums[g][1]);
    if (warp < GROUP && lane == 0)
        *reinterpret_cast<float2*>(mine + GROUP * kDim + 2 * warp) = make_float2(state.peak, state.total);
    if (!arrives_last(arrivals + row, active)) return;
    if (warp < GROUP) {  // weights of the partial results, of which each lane has two
        static_assert(MAX_DECODE_SPLITS <= 64);
        float2 ends[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int i = lane + 32 * j;
            ends[j] = make_float2(-kInfinity, 0.f);
            if (i < active) ends[j] = *reinterpret_cast<const float2*>(partials + i * kPartial + GROUP * kDim + 2 * warp);
        }
        const float peak = warp_max(fmaxf(ends[0].x, ends[1].x));
        const float factors[2] = {exp2f(__fsub_rn(ends[0].x, peak)), exp2f(__fsub_rn(ends[1].x, peak))};
        const float total = warp_sum(fmaf(factors[1], ends[1].y, __fmul_rn(factors[0], ends[0].y)));
        const float normal = State<GROUP>::normalizer(peak, total, sinks, warp);
#pragma unroll
        for (int j = 0; j < 2; ++j) shared.weight(lane + 32 * j, warp) = __fmul_rn(factors[j], normal);
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        float2 sum = make_float2(0.f, 0.f);
        for (int i = 0; i < active; ++i) {
            const float2 x = *reinterpret_cast<const float2*>(partials + i * kPartial + g * kDim + column);
            const float w = shared.weight(i, g);
            sum.x = fmaf(w, x.x, sum.x), sum.y = fmaf(w, x.y, sum.y);
        }
        store(g, sum);
    }
}

template <int GROUP, class Kv>
__global__ void __launch_bounds__(kThreads)
    attention_512_chunk(unsigned int* y, const unsigned short* q, const typename Kv::Element* k_cache,
                        const typename Kv::Element* v_cache, const PrefillBatch batch, const float* sinks, int n_heads,
                        int n_kv_heads, int window) {
    __shared__ Shared<GROUP> shared;
    const int row = blockIdx.y, head = blockIdx.x * GROUP;
    if (row >= batch.size->rows) return;
    const auto [position, table] = batch.rows[row];
    grid_dependency_wait();
    State<GROUP> state = {};
    if (position >= 0) {
        const Caches<Kv> caches = {k_cache, v_cache, batch.tables + table, n_kv_heads, head / (n_heads / n_kv_heads)};
        const float scale = __fmul_rn(rsqrtf((float)kDim), kLog2e);
        q += ((size_t)row * n_heads + head) * kDim;
        for (int at = threadIdx.x; at < GROUP * kDim; at += kThreads)
            shared.queries[at / kDim][at % kDim] = __fmul_rn(half_to_float(q[at]), scale);
        __syncthreads();
        state.start(shared);
        const SplitTiles tiles(position, window, kTile, 1, 0);
        for (int tile = tiles.first; tile < tiles.first + tiles.tiles; ++tile)
            state.add(shared, caches, tile, tiles.oldest, position, false);
        state.normalize(shared, sinks ? sinks + head : nullptr);
    }
    unsigned int* const out = y + (size_t)row * n_heads * kDim / 2;
    for (int g = 0; g < GROUP; ++g)
        out[fragment_index((head + g) * kDim + 2 * threadIdx.x) / 2] = floats_to_half2(state.sums[g][0], state.sums[g][1]);
}
