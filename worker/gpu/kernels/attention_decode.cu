// One generated token a sequence: RoPE of q and k, the KV write, and attention over the cache, split over its length.
//
//   y_h = Σ_p softmax_p(q_h · k_p / √D) v_p   over positions max(0, t-window+1) … t; a sink logit joins the denominator.
// Flash-decoding (Dao et al. 2023): positions are cut into splits of 64 at absolute multiples of 64. Block g of the grid
// takes the splits s ≡ g (mod G) by online softmax, the block that arrives last adds the blocks' parts by log-sum-exp in
// the order of their oldest split. G is fixed at load, so the arithmetic follows from the position alone.
//
// q [S, H·D], k, v [S, Hk·D] f32; y [S, H·D] f32 and the same rows as q8, meta (quantized.cuh); caches as in kv_cache.cuh;
// tables [S, table_stride] i32, positions [S] i32; sinks [H] f32 or null. parts: S·(H/GROUP)·G·GROUP·(D+2) f32; arrivals:
// S·(H/GROUP) u32, zeros before and after. Caches are 16-byte aligned.
// Grid (G, H/GROUP, S), 128·⌈GROUP/2⌉ threads: GROUP query heads share one KV head. A warp takes one KV block of a split
// and two of the heads: D/8 lanes a position, 16 bytes a lane, keys and values all in flight together, those of a block's
// first split before the queries are there (early.cuh).
// Bytes: the keys and values that are seen, once per GROUP heads, plus the parts, which stay in L2.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache, `quantize` in worker/cpu/quantized.py.
#include "early.cuh"
#include "half.cuh"
#include "kv_cache.cuh"
#include "quantized.cuh"
#include "rope.cuh"
#include "warp.cuh"

constexpr int kSplit = 64, kBlocks = kSplit / kKvBlock, kMaxParts = 64;
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int heads_per_warp(int group) { return group == 1 ? 1 : 2; }

template <int HEADS>
struct Running {  // one warp's softmax so far, in base 2: a lane's positions, and elements [8·part, 8·part + 8) of D
    float peak[HEADS], total[HEADS], sum[HEADS][8];
};

// One KV block in a warp's registers: D/8 lanes a position, 8 elements a lane.
template <int D>
struct KvRows {
    static constexpr int kLanes = D == 64 ? 8 : 16, kAtOnce = 32 / kLanes, kRounds = kKvBlock / kAtOnce;
    uint4 keys[kRounds], values[kRounds];

    __device__ __forceinline__ static int position(int start, int round) {
        return start + round * kAtOnce + threadIdx.x % 32 / kLanes;
    }

    // Positions from `oldest` to before `newest`; the others are zeros: an unwritten slot may hold NaN, and 0·NaN is none.
    __device__ __forceinline__ void load(const unsigned short* k_block, const unsigned short* v_block, int start,
                                         int oldest, int newest) {
        const int part = threadIdx.x % kLanes;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            const int p = position(start, r), at = (p - start) * D + 8 * part;
            keys[r] = values[r] = make_uint4(0, 0, 0, 0);
            if (part >= D / 8 || p < oldest || p >= newest) continue;
            keys[r] = *reinterpret_cast<const uint4*>(k_block + at);
            values[r] = *reinterpret_cast<const uint4*>(v_block + at);
        }
    }

    // The newest position's, which are on their way to the cache only now.
    __device__ __forceinline__ void take(const unsigned short* key, const unsigned short* value, int start, int newest) {
        const int part = threadIdx.x % kLanes;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            if (position(start, r) != newest || part >= D / 8) continue;
            keys[r] = *reinterpret_cast<const uint4*>(key + 8 * part);
            values[r] = *reinterpret_cast<const uint4*>(value + 8 * part);
        }
    }
};

// Keys and values of one KV block against the warp's queries.
template <int D, int HEADS>
__device__ __forceinline__ void attend_block(Running<HEADS>& run, const float (&q)[HEADS][8], const KvRows<D>& kv,
                                             int start, int oldest, int newest) {
    constexpr int kLanes = KvRows<D>::kLanes, kRounds = KvRows<D>::kRounds;
    float scores[kRounds][HEADS];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        float key[8];
        unpack8(kv.keys[r], key);
        const int position = KvRows<D>::position(start, r);
        const bool seen = position >= oldest && position <= newest;
#pragma unroll
        for (int g = 0; g < HEADS; ++g) {
            float dot = 0.f;
#pragma unroll
            for (int e = 0; e < 8; ++e) dot = fmaf(q[g][e], key[e], dot);
            dot = warp_sum<kLanes>(dot);
            scores[r][g] = seen ? dot : -kInfinity;
        }
    }
#pragma unroll
    for (int g = 0; g < HEADS; ++g) {
        float peak = run.peak[g];
#pragma unroll
        for (int r = 0; r < kRounds; ++r) peak = fmaxf(peak, scores[r][g]);
        peak = warp_max(peak);
        const float scale = exp2f(run.peak[g] - peak);
        run.peak[g] = peak;
        run.total[g] *= scale;
#pragma unroll
        for (int e = 0; e < 8; ++e) run.sum[g][e] *= scale;
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        float value[8];
        unpack8(kv.values[r], value);
#pragma unroll
        for (int g = 0; g < HEADS; ++g) {
            const float weight = exp2f(scores[r][g] - run.peak[g]);
            run.total[g] += weight;
#pragma unroll
            for (int e = 0; e < 8; ++e) run.sum[g][e] = fmaf(weight, value[e], run.sum[g][e]);
        }
    }
}

// A part, of the warps that share a KV block or of a block: sums [GROUP][D], then (peak, total) [GROUP][2].
__host__ __device__ constexpr int part_floats(int head_dim, int group) { return group * (head_dim + 2); }

// Adds over the warp's positions, then leaves its heads, from `head` on, in the part.
template <int D, int GROUP, int HEADS>
__device__ __forceinline__ void leave_warp(Running<HEADS>& run, int head, float* part) {
    constexpr int kLanes = D == 64 ? 8 : 16;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < HEADS; ++j) {
#pragma unroll
        for (int step = kLanes; step < 32; step *= 2) {
            run.total[j] += __shfl_xor_sync(0xffffffffu, run.total[j], step);
#pragma unroll
            for (int e = 0; e < 8; ++e) run.sum[j][e] += __shfl_xor_sync(0xffffffffu, run.sum[j][e], step);
        }
        const int h = head + j;
        if (h < GROUP && lane < D / 8) {
#pragma unroll
            for (int e = 0; e < 8; ++e) part[h * D + 8 * lane + e] = run.sum[j][e];
        }
        if (h < GROUP && lane == 0) part[GROUP * D + 2 * h] = run.peak[j], part[GROUP * D + 2 * h + 1] = run.total[j];
    }
}

struct Result {  // where the finished rows [GROUP][D] begin: at element `column` of a row of `cols`
    float* y;    // null: not finished
    u8* q8;
    Meta* meta;
    const float* sinks;
    int column, cols;
};

// Adds `n` parts, the first at parts[first] and on around `period` of them. With a result it ends the softmax, sinks
// included, and writes it; without, it leaves one such part at `out`. Ends synchronized.
template <int D, int GROUP>
__device__ void combine(const float* parts, int n, int first, int period, float (*weights)[kMaxParts], float* out,
                        const Result result) {
    constexpr int kPart = part_floats(D, GROUP), kEach = kMaxParts / 32;
    const int lane = threadIdx.x % 32;
    const auto part = [=](int i) { return parts + (first + i < period ? first + i : first + i - period) * kPart; };
    for (int g = threadIdx.x / 32; g < GROUP; g += blockDim.x / 32) {
        const float sink = result.y && result.sinks ? result.sinks[g] * kLog2e : -kInfinity;
        float2 ends[kEach];
        float peak = sink, total = 0.f;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const int i = lane + 32 * j;
            ends[j] = make_float2(-kInfinity, 0.f);
            if (i < n) ends[j] = *reinterpret_cast<const float2*>(part(i) + GROUP * D + 2 * g);
            peak = fmaxf(peak, ends[j].x);
        }
        peak = warp_max(peak);
#pragma unroll
        for (int j = 0; j < kEach; ++j) total = fmaf(exp2f(ends[j].x - peak), ends[j].y, total);
        total = warp_sum(total);
        const float scale = result.y ? 1.f / (total + exp2f(sink - peak)) : 1.f;
#pragma unroll
        for (int j = 0; j < kEach; ++j)
            if (lane + 32 * j < n) weights[g][lane + 32 * j] = exp2f(ends[j].x - peak) * scale;
        if (!result.y && lane == 0) out[GROUP * D + 2 * g] = peak, out[GROUP * D + 2 * g + 1] = total;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < GROUP * D; at += blockDim.x) {  // whole warps: D is a multiple of 32
        float sum = 0.f;
#pragma unroll 32
        for (int i = 0; i < n; ++i) sum = fmaf(weights[at / D][i], part(i)[at], sum);
        if (!result.y) {
            out[at] = sum;
            continue;
        }
        result.y[result.column + at] = sum;
        store_quantized_lane(sum, result.column + at, result.cols, result.q8, result.meta);
    }
    __syncthreads();
}

template <int D, int GROUP, bool ADJACENT>
__global__ void __launch_bounds__(32 * kBlocks * ((GROUP + 1) / 2))
    attention_decode(float* y, u8* q8, Meta* meta, const float* q, const float* k, const float* v,
                     unsigned short* k_cache, unsigned short* v_cache, const float* cos, const float* sin, int dims,
                     const int* positions, const int* tables, int table_stride, const float* sinks, float* parts,
                     unsigned int* arrivals, int n_heads, int n_kv_heads, int window) {
    constexpr int kPart = part_floats(D, GROUP), kLanes = D == 64 ? 8 : 16, kHeads = heads_per_warp(GROUP);
    __shared__ float queries[GROUP][D], block_parts[kBlocks][kPart], weights[GROUP][kMaxParts];
    __shared__ __align__(16) unsigned short new_key[D], new_value[D];
    __shared__ bool last;
    const int sequence = blockIdx.z, head = blockIdx.y * GROUP, kv_head = head / (n_heads / n_kv_heads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, periods = gridDim.x;
    const int newest = positions[sequence], oldest = window && newest >= window ? newest - window + 1 : 0;
    const int first = oldest / kSplit, splits = newest / kSplit - first + 1, active = min(splits, periods);
    const int mine = (blockIdx.x - first % periods + periods) % periods;  // this block's first split, counted from `first`
    if (mine >= splits) return;
    const int* table = tables + (size_t)sequence * table_stride;
    const RopeTables rope = {cos, sin, dims};
    const int block_of_split = warp % kBlocks, first_head = warp / kBlocks * kHeads;
    const auto start_of = [&](int split) { return (first + split) * kSplit + block_of_split * kKvBlock; };
    KvRows<D> kv;
    const auto load = [&](int split) {
        const int start = start_of(split);
        if (start > newest || start + kKvBlock <= oldest) return;
        const size_t at = kv_offset<D>(table[start / kKvBlock], n_kv_heads, kv_head, start);
        kv.load(k_cache + at, v_cache + at, start, oldest, newest);
    };
    load(mine);
    wait_for_inputs();

    const float* heads = q + ((size_t)sequence * n_heads + head) * D;
    const float scale = rsqrtf((float)D) * kLog2e;
    for (int at = threadIdx.x; at < GROUP * D; at += blockDim.x)
        queries[at / D][at % D] = rotated<ADJACENT>(heads + at / D * D, at % D, newest, rope) * scale;
    if ((splits - 1 - mine) % periods == 0) {  // the newest split is here: so are its readers, all in this block
        const size_t from = ((size_t)sequence * n_kv_heads + kv_head) * D;
        const size_t to = kv_offset<D>(table[newest / kKvBlock], n_kv_heads, kv_head, newest);
        for (int e = threadIdx.x; e < D; e += blockDim.x) {
            const float key = rotated<ADJACENT>(k + from, e, newest, rope);
            k_cache[to + e] = new_key[e] = float_to_half(clamp_to_half_range(key));
            v_cache[to + e] = new_value[e] = float_to_half(clamp_to_half_range(v[from + e]));
        }
    }
    __syncthreads();

    float turned[kHeads][8];
    Running<kHeads> run;
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
        run.peak[j] = -kInfinity, run.total[j] = 0.f;
        const bool real = first_head + j < GROUP && lane % kLanes < D / 8;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            turned[j][e] = real ? queries[first_head + j][8 * (lane % kLanes) + e] : 0.f;
            run.sum[j][e] = 0.f;
        }
    }
    for (int split = mine; split < splits; split += periods) {
        const int start = start_of(split);
        if (split != mine) load(split);
        if (start > newest || start + kKvBlock <= oldest) continue;
        kv.take(new_key, new_value, start, newest);
        attend_block<D, kHeads>(run, turned, kv, start, oldest, newest);
    }
    leave_warp<D, GROUP, kHeads>(run, first_head, block_parts[block_of_split]);
    __syncthreads();

    const size_t row = (size_t)sequence * n_heads * D, group = (size_t)sequence * gridDim.y + blockIdx.y;
    const Result result = {y + row, q8 + row, meta + row / 32, sinks ? sinks + head : nullptr, head * D, n_heads * D};
    parts += group * periods * kPart;
    combine<D, GROUP>(block_parts[0], kBlocks, 0, kBlocks, weights, parts + blockIdx.x * kPart,
                      active == 1 ? result : Result{});
    if (active == 1) return;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(arrivals + group, active - 1) == active - 1;  // the last one leaves the counter at zero
        __threadfence();
    }
    __syncthreads();
    if (last) combine<D, GROUP>(parts, active, first % periods, periods, weights, nullptr, result);
}
