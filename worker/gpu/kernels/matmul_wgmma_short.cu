// Prefill of short chunks on sm_90: the product of matmul_wgmma.cu, bit for bit, with weights that
// warps of their own convert into shared memory.
//
// A block computes 64 rows (with GLU 32 of a gate and the same 32 of its `up`) × TILE_N tokens: one
// warpgroup issues the MMAs, and kConverters warpgroups take the steps of 128 columns in turn. A
// converter copies its step of x by the tensor map, and stores its step of weights as f16; both are
// operands in shared memory, in a ring of STAGES. A few blocks thus have many loads in flight, and
// the chain of MMAs does not wait for a conversion.
// Each y[t, r] is one chain of MMAs over ascending columns.
// Parameters, shapes, grid and alignment: as in matmul_wgmma.cu, blocks of 64 rows, 128·(1 +
// kConverters) threads. Dynamic shared memory: (16,384 + 256·TILE_N)·STAGES + 1,024 bytes.
// Twins: `matmul`, `gated` in worker/cpu/plain.py; tests/quantized_ops.py. Launcher:
// worker/gpu/matmul_wgmma.py.
#include "pdl.cuh"
#include "wgmma_tile.cuh"

constexpr int kConverters = 5, kWeightBytes = 64 * kPanelBytes;  // of a panel of weights

// Addresses in shared memory of a stage's two panels of weights and two of x.
template <int TILE_N>
__device__ __forceinline__ u32 weights_at(u32 memory, int stage, int panel) {
    return memory + stage * 2 * (kWeightBytes + TILE_N * kPanelBytes) + panel * kWeightBytes;
}
template <int TILE_N>
__device__ __forceinline__ u32 x_at(u32 memory, int stage, int panel) {
    return weights_at<TILE_N>(memory, stage, 2) + panel * TILE_N * kPanelBytes;
}

// Store a lane's 32 columns of a step of one row. The lanes of a quad store a 16-byte chunk
// together, and the eight rows of a warp its chunks in all banks.
__device__ __forceinline__ void store_row(u32 panels, int row, const u32 (&h)[16]) {
    const u32 at = panels + row * kPanelBytes + threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < 16; ++i)
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + i / 8 * kWeightBytes + ((i % 8 ^ row & 7) << 4)), "r"(h[i])
                     : "memory");
}

// Fill the stages of the steps converter, converter + kConverters, …
template <class Block, int TILE_N, int STAGES, int GLU>
__device__ __forceinline__ void convert(const Projection* projections, const TensorMap& x, int cols, int steps, const SlotTile& tile,
                                        int row0, const Stages<STAGES>& ring) {
    using Weights = WeightIterator<Block, 1, GLU>;
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, converter = threadIdx.x / 128 - 1;
    const Weights weights(projections, cols, tile.expert, row0);
    Unit<Block> units[Weights::kUnits][2];
    const auto load = [&](int step) {
#pragma unroll
        for (int k = 0; k < Weights::kUnits; ++k) weights.load(projections, min(step, steps - 1), k, units[k]);
    };
    load(converter);
    grid_dependency_wait();
    for (int step = converter; step < steps; step += kConverters) {
        const int stage = step % STAGES, lap = step / STAGES;
        if (lap) wait_for_phase(ring.empty(stage), lap - 1 & 1);
        if (threadIdx.x % 128 == 0) {
            expect_bytes(ring.full(stage), 2 * TILE_N * kPanelBytes);
            for (int panel = 0; panel < 2; ++panel)
                copy_box(x_at<TILE_N>(ring.memory, stage, panel), x, (2 * step + panel) * kPanel, tile.first, ring.full(stage));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 h[16];
            to_half2(weights, units, i, step, h);
            store_row(weights_at<TILE_N>(ring.memory, stage, 0), row + 8 * i, h);
        }
        fence_shared_stores();
        arrive(ring.full(stage), 1);  // each thread: racecheck does not see an order through __syncwarp
        load(step + kConverters);  // not before the fence, which waits for all loads
    }
}

template <int TILE_N, int STAGES>
__device__ __forceinline__ void multiply(int steps, const Stages<STAGES>& ring, Accumulator<1, TILE_N>& acc) {
#pragma unroll
    for (int n = 0; n < TILE_N / 8; ++n) settle(acc[0][n]);
    begin_mmas();
#pragma unroll 1
    for (int step = 0, stage = 0, parity = 0, released = 0; step < steps; ++step) {
        wait_for_phase(ring.full(stage), parity);
        begin_mmas();
#pragma unroll
        for (int s = 0; s < kColumnGroup / 16; ++s)
            mma_64xNx16(acc[0], descriptor(weights_at<TILE_N>(ring.memory, stage, s / 4) + s % 4 * 32),
                        descriptor(x_at<TILE_N>(ring.memory, stage, s / 4) + s % 4 * 32));
        commit_mmas();
        if (++stage == STAGES) stage = 0, parity ^= 1;
        wait_for_mmas<1>();  // the MMAs of the step before are complete: its stage is free
        if (step == 0) continue;
        if (threadIdx.x % 32 == 0) arrive(ring.empty(released), 1);
        if (++released == STAGES) released = 0;
    }
    wait_for_mmas<0>();
#pragma unroll
    for (int n = 0; n < TILE_N / 8; ++n) settle(acc[0][n]);
}

template <class Block, int TILE_N, int STAGES, int GLU, class Last = Block>
__global__ void __launch_bounds__(128 * (1 + kConverters), 1)
    matmul_wgmma_short(const __grid_constant__ MatmulParams p, const __grid_constant__ TensorMap x, const int n_tokens,
          const SlotTiles tiles) {
    // A converter that waits for a stage is at most one lap ahead of it: two would have the same
    // parity.
    static_assert(STAGES >= kConverters, "");
    extern __shared__ u8 shared[];
    __shared__ TokenTile<TILE_N> tokens;
    __shared__ unsigned long long barriers[2 * STAGES];
    const SlotTile tile = token_tile<TILE_N>(p, tiles, n_tokens, blockIdx.y);
    if (tile.count <= 0) return;
    const Stages<STAGES> ring(shared, barriers);
    if (threadIdx.x == 0) ring.init(129, 4);  // a converter's threads and its copy of x; the warps that multiply
    __syncthreads();
    const Projection* projections = projection_of<GLU>(p, blockIdx.x);
    const int steps = (p.cols + kColumnGroup - 1) / kColumnGroup;
    const int row0 = ((blockIdx.x - projections->first_block) * 4 + threadIdx.x / 32 % 4) * (GLU ? 8 : 16);
    if (threadIdx.x >= 128) {
        if (kSame<Block, Last> || projections != p.projections + 2)
            convert<Block, TILE_N, STAGES, GLU>(projections, x, p.cols, steps, tile, row0, ring);
        else
            convert<Last, TILE_N, STAGES, GLU>(projections, x, p.cols, steps, tile, row0, ring);
    } else {
        grid_dependency_wait();
        read_tokens<128>(p, tiles, tile, tokens);
        Accumulator<1, TILE_N> acc = {};
        multiply<TILE_N>(steps, ring, acc);
        wait_for_group();
        write<TILE_N, 1, TILE_N, GLU>(p, projections, tokens, 0, row0, acc);
    }
}
