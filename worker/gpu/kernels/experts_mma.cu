// Decode of many rows: an expert's MXFP4 products for up to 8·MAX_NT pairs of a row and an expert
// on the int8 tensor cores, each weight loaded and unpacked once for all of them.
//
// Products, shapes and results: pair_product.cuh, for weights of type MXFP4 with a multiple of 32
// rows and of 64 columns, at least 512.
// Grid: x over equal shares of the work, any number; 512 threads. The work is the chunks of all
// tiles (expert_tiles.cuh, experts_mma_stages.cuh): 32 elements of h, or 64 rows of W. Of 16 rows
// of an MMA with GATED 8 are of gate and 8 of up.
// Alignment: planes, biases and q 16 bytes. Dynamic shared memory: `MmaShared`. Bytes: the weights
// of each distinct expert once for each of its tiles, 16-byte copies, all slots but one in flight.
// Order and rounding: the bits of glu.cu with experts and of the products of experts_add.cu. A warp
// adds its chains (bits 16 and 8 of the butterfly over 32 chains), the warps along K are added
// through shared memory (bits 4 and 2), then the even and the odd chains (bit 1).
// scale·sum is one fma that subtracts scale·kIntBias, which is exact unless it overflows: chunks
// with scales of 2¹⁰⁵ and more subtract first. Only a zero's sign may differ, which no sum keeps.
// Twins: `experts_glu`, `experts_add` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher:
// worker/gpu/decode_experts.py.
#include "experts_mma_stages.cuh"
#include "experts_mma_sums.cuh"
#include "fp4_unpacker.cuh"
#include "pdl.cuh"

// Steps of a stage, and the stages of a warp's codes in shared memory.
template <int MAX_NT>
constexpr int kSteps = MAX_NT <= 2 ? 2 : 1;
template <int MAX_NT>
constexpr int kSlots = MAX_NT <= 2 ? MMA_SLOTS : MMA_WIDE_SLOTS;

// Narrow tiles leave room for the starts of sums; the instructions to subtract the zero point from
// codes are then saved, which matter most where few pairs share them.
template <int MAX_NT>
using Record = PairRecord<MAX_NT <= 2>;

// Dynamic shared memory; the scales of two chunks and x follow. Python: `_mma_bytes`.
template <int MAX_NT>
struct MmaShared {
    float sums[MmaSums<MAX_NT>::kFloats];
    u8 codes[kMmaWarps][kSlots<MAX_NT>][kSteps<MAX_NT> * kStepBytes];
    float scales[kMmaWarps][2][kSteps<MAX_NT> * 32];
    TilePairs<MAX_NT> pairs;
    int has_large[4];  // whether a chunk has scales of 2¹⁰⁵ and more, by the parity of its number
    static __device__ __forceinline__ int scale_bytes(int units) { return kChunkRows * units + kBiasBytes; }
    __device__ __forceinline__ u8* chunk_scales(int buffer, int units) {
        return reinterpret_cast<u8*>(this + 1) + buffer * scale_bytes(units);
    }
    __device__ __forceinline__ Record<MAX_NT>* x(int units) {
        return reinterpret_cast<Record<MAX_NT>*>(chunk_scales(2, units));
    }
};

template <int NT>
using LaneSums = float[NT][4];

// What a warp needs to multiply its stages. Of lane l, rows l/4 and l/4 + 8 and pairs l%4·2 and the
// next.
template <int MAX_NT, bool GATED>
struct Multiplier {
    static constexpr bool kStarts = MAX_NT <= 2;
    static constexpr int kStage = kSteps<MAX_NT> * kStepBytes, kBytes = kSlots<MAX_NT> * kStage;
    const PairProduct& p;
    MmaShared<MAX_NT>& shared;
    const MmaWarp warp;
    const Fp4Unpacker unpacker;
    CodeStream<kSteps<MAX_NT>, GATED> stream;
    u32 codes;          // the lane's row of `ldmatrix` in the first slot
    int slot, freed;    // bytes to the slot of the next stage and to the one before it
    int scale, buffer;  // the lane's scale of unit 0 in a chunk's; the buffer of converted ones

    __device__ __forceinline__ Multiplier(const PairProduct& p, const ChunkWalk& walk, MmaShared<MAX_NT>& shared)
        : p(p), shared(shared), warp(p.cols / 32), unpacker((u32)(p.rows + (int)threadIdx.x) >> 31),
          stream(p, walk, warp, shared.codes[threadIdx.x / 32]), slot(0), freed(kBytes - kStage), buffer(0) {
        const int lane = threadIdx.x % 32, r = lane / 2;
        const int row = GATED ? r / 8 * (kChunkRows / 2) + 8 * warp.row_tile + r % 8 : 16 * warp.row_tile + r;
        scale = row * warp.units + lane % 2;
        // Matrices: rows 0-7 and 8-15 of the first unit, then of the second.
        codes = (u32)__cvta_generic_to_shared(shared.codes[threadIdx.x / 32]) + lane % 16 * 32 +
                (lane / 16 ^ (lane >> 2 & 1)) * 16;
    }
    __device__ __forceinline__ void copy_ahead() {
#pragma unroll 1
        for (int i = 0; i < kSlots<MAX_NT> - 1; ++i) stream.copy(p, warp, i * kStage);
    }

    // sums += w·x over one unit. Words: of the lane's two rows; scales: theirs. FOLDS:
    // scale·kIntBias is finite.
    template <int NT, bool FOLDS>
    __device__ __forceinline__ void multiply_unit(u32 upper, u32 lower, float scale0, float scale1, const Record<MAX_NT>* x,
                                                  LaneSums<NT>& sums) const {
        const int lane = threadIdx.x % 32;
        u32 a[4];
        unpacker.unpack<!kStarts>(upper, a[0], a[2]);
        unpacker.unpack<!kStarts>(lower, a[1], a[3]);
        const float scales[2] = {scale0, scale1};
        const float offsets[2] = {__fmul_rn(scale0, -kIntBias), __fmul_rn(scale1, -kIntBias)};
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint2 b = x[n].b[lane];
            const float2 pair = *reinterpret_cast<const float2*>(x[n].scales + lane % 4 * 2);
            const float x_scale[2] = {pair.x, pair.y};
            float c[4];
            if constexpr (kStarts) mma_16x8x32_s8(c, a, b.x, b.y, *reinterpret_cast<const int4*>(x[n].starts[lane % 4]));
            else mma_16x8x32_s8(c, a, b.x, b.y, make_int4(kIntBiasBits, kIntBiasBits, kIntBiasBits, kIntBiasBits));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float y = FOLDS ? __fmaf_rn(scales[i / 2], c[i], offsets[i / 2])
                                      : __fmul_rn(scales[i / 2], __fsub_rn(c[i], kIntBias));
                sums[n][i] = __fmaf_rn(y, x_scale[i % 2], sums[n][i]);
            }
        }
    }

    // Add the products of the COUNT steps of the next stage: of units j of the first one to a[j],
    // of the second one to b[j]. `e`: the lane's scales; x: records of the first unit.
    template <int NT, bool FOLDS, int COUNT>
    __device__ __forceinline__ void multiply_stage(const u8* e, const Record<MAX_NT>* x, LaneSums<NT> (&a)[2],
                                                   LaneSums<NT> (&b)[2]) {
        const int lane = threadIdx.x % 32;
        buffer ^= 1;
        float* const converted = shared.scales[threadIdx.x / 32][buffer];
        // An E8M0 scale as f32, half of it since codes are doubled (scales.cuh): denormals are
        // zeros.
#pragma unroll
        for (int k = 0; k < COUNT; ++k)
            converted[32 * k + (lane & 14) * 2 + lane % 2 * 2 + lane / 16] =
                __int_as_float(max(e[k * kStepUnits] - 1, 0) << 23);
        wait_for_copies<kSlots<MAX_NT> - 2>();
        __syncwarp();
        float4 scales[COUNT];
        u32 words[COUNT][4];
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            scales[k] = *reinterpret_cast<const float4*>(converted + 32 * k + lane / 4 * 4);
            load_matrices(words[k], codes + slot + k * kStepBytes);
        }
        stream.copy(p, warp, freed);  // the whole warp has read that slot
        freed = slot, slot = slot == kBytes - kStage ? 0 : slot + kStage;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            LaneSums<NT>(&sums)[2] = k == 0 ? a : b;
            const Record<MAX_NT>* const of_step = x + k * kStepUnits * NT;
            multiply_unit<NT, FOLDS>(words[k][0], words[k][1], scales[k].x, scales[k].y, of_step, sums[0]);
            multiply_unit<NT, FOLDS>(words[k][2], words[k][3], scales[k].z, scales[k].w, of_step + NT, sums[1]);
        }
    }

    // Store the warp's sums of a chunk. Contains the barrier after which the preceding chunk's sums
    // have been read.
    template <int NT, bool FOLDS>
    __device__ __forceinline__ void multiply_chunk(const u8* scales, const Record<MAX_NT>* records) {
        const MmaSums<NT> stored{shared.sums};
        float* const own = stored.own(warp);
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            LaneSums<NT> a[2] = {}, b[2] = {};  // chains l and l + 16, each even and odd
            const u8* const e = scales + scale;
            const Record<MAX_NT>* x = records + warp.first_unit(half) * NT;
            int u = warp.first_unit(half);
            constexpr int kStep = kStepUnits, kBoth = kSteps<MAX_NT>;
#pragma unroll 1
            for (; u + kStep < warp.units; u += 2 * kStep, x += 2 * kStep * NT) {
                multiply_stage<NT, FOLDS, kBoth>(e + u, x, a, b);
                if (kBoth == 1) multiply_stage<NT, FOLDS, 1>(e + u + kStep, x + kStep * NT, b, b);
            }
            if (u < warp.units) multiply_stage<NT, FOLDS, 1>(e + u, x, a, b);
            if (half == 0) __syncthreads();
#pragma unroll
            for (int parity = 0; parity < 2; ++parity)
#pragma unroll
                for (int i = 0; i < 4 * NT; ++i) {
                    float& at = own[(parity * NT + i / 4) * MmaSums<NT>::kGroup + i % 4 * MmaSums<NT>::kElement];
                    const float sum = __fadd_rn(a[parity][i / 4][i % 4], b[parity][i / 4][i % 4]);
                    at = half == 0 ? sum : __fadd_rn(at, sum);
                }
        }
    }
};

// Write the results of a chunk from the sums of all warps. `biases`: those of the chunk's rows
// `lane` and lane + 32.
template <int NT, int MAX_NT, bool GATED>
__device__ __forceinline__ void finish_chunk(const PairProduct& p, MmaShared<MAX_NT>& shared, int count, int chunk,
                                             const float (&biases)[2]) {
    const MmaSums<NT> sums{shared.sums};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int kParts = GATED ? 1 : kChunkRows / 32;
    for (int i = warp; i < kParts * count; i += kMmaWarps) {
        const int t = i / kParts, part = i % kParts, row = 32 * part + lane;
        const size_t pair = shared.pairs.pair[t];
        const float factor = shared.pairs.factor[t];
        if constexpr (GATED)
            store_gated(p, pair, kChunkRows / 2 * chunk + lane, sums.total(lane / 8, lane % 8, t),
                        sums.total(lane / 8, lane % 8 + 8, t), factor, biases[0], biases[1]);
        else
            store_weighted(p, pair, kChunkRows * chunk + row, sums.total(row / 16, row % 16, t), factor,
                           part == 0 ? biases[0] : biases[1]);
    }
}

// Set `has_large` of chunk `number` if one of the scales that this thread copied is 2¹⁰⁵ or more,
// an E8M0 byte of 233 or more, and clear that of the chunk after it. A barrier must follow.
template <int MAX_NT, bool GATED>
__device__ __forceinline__ void find_large_scales(MmaShared<MAX_NT>& shared, int number, int units) {
    constexpr int kMatrices = GATED ? 2 : 1, kRows = kChunkRows / kMatrices;
    const u8* const scales = shared.chunk_scales(number % 2, units);
    u32 found = 0;
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
        for (int i = 16 * threadIdx.x; i < kRows * units; i += 16 * kMmaThreads) {
            const uint4 v = *reinterpret_cast<const uint4*>(scales + m * kRows * units + i);
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int w = 0; w < 4; ++w) found |= ((words[w] & 0x7f7f7f7f) + 0x01010101 * (256 - 233)) & words[w] & 0x80808080;
        }
    if (found) shared.has_large[number % 4] = 1;
    if (threadIdx.x == 0) shared.has_large[(number + 1) % 4] = 0;
}

// Multiply and finish chunk number `number` of this block, of a tile of `count` pairs, at most
// 8·NT.
template <int NT, int MAX_NT, bool GATED>
__device__ __forceinline__ void compute_chunk(Multiplier<MAX_NT, GATED>& multiplier, int number, int count, int chunk) {
    const PairProduct& p = multiplier.p;
    MmaShared<MAX_NT>& shared = multiplier.shared;
    const int units = multiplier.warp.units;
    const u8* const scales = shared.chunk_scales(number % 2, units);
    if (shared.has_large[number % 4]) multiplier.template multiply_chunk<NT, false>(scales, shared.x(units));
    else multiplier.template multiply_chunk<NT, true>(scales, shared.x(units));
    // A chunk of fewer stages than are in flight does not wait for the scales of the next one.
    if (units < 8 * kSlots<MAX_NT> * kSteps<MAX_NT> + 22) wait_for_copies<0>();
    // Read before the barrier, after which the next copies may replace them.
    const float* const from = reinterpret_cast<const float*>(scales + kChunkRows * units) + threadIdx.x % 32;
    const float biases[2] = {p.bias[0] ? from[0] : 0.f, p.bias[GATED] ? from[32] : 0.f};
    find_large_scales<MAX_NT, GATED>(shared, number + 1, units);
    __syncthreads();
    finish_chunk<NT, MAX_NT, GATED>(p, shared, count, chunk, biases);
}

template <int MAX_NT, bool GATED>
__global__ void __launch_bounds__(kMmaThreads, 1)
    experts_mma(const __grid_constant__ PairProduct p, const ExpertTiles tiles) {
    extern __shared__ __align__(16) u8 dynamic[];
    MmaShared<MAX_NT>& shared = *reinterpret_cast<MmaShared<MAX_NT>*>(dynamic);
    const int units = p.cols / 32, chunk_rows = GATED ? kChunkRows / 2 : kChunkRows;
    // As in grouped_experts.cu: the dependent reads the tiles before its own wait.
    if (GATED) grid_dependency_wait();
    ChunkWalk walk(tiles, (p.rows + chunk_rows - 1) / chunk_rows);
    Multiplier<MAX_NT, GATED> multiplier(p, walk, shared);
    copy_scales<GATED>(p, walk, shared.chunk_scales(0, units));
    multiplier.copy_ahead();
    if (threadIdx.x < 4) shared.has_large[threadIdx.x] = 0;
    if (!GATED) grid_dependency_wait();
    int staged = -1;
    for (int number = 0; walk.valid(); ++number) {
        const ExpertTile tile = walk.tile;
        const int chunk = walk.chunk;
        if (staged != walk.at) {
            __syncthreads();  // the preceding tile's last chunk is finished; or `has_large` is initialized
            stage_pairs<GATED>(p, tiles, tile, shared.pairs, shared.x(units));
            if (staged < 0) {
                wait_for_copies<kSlots<MAX_NT> - 2>();  // the first scales
                find_large_scales<MAX_NT, GATED>(shared, 0, units);
            }
            __syncthreads();
        }
        staged = walk.at;
        walk.advance();
        copy_scales<GATED>(p, walk, shared.chunk_scales((number + 1) % 2, units));
        if (tile.count <= 8) compute_chunk<1>(multiplier, number, tile.count, chunk);
        else if (MAX_NT == 2 || tile.count <= 16) compute_chunk<2>(multiplier, number, tile.count, chunk);
        else if (tile.count <= 24) compute_chunk<MAX_NT == 2 ? 2 : 3>(multiplier, number, tile.count, chunk);
        else compute_chunk<MAX_NT>(multiplier, number, tile.count, chunk);
    }
}
