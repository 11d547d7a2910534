// Decode of several rows: norm and Q8 blocks of each input row, once for all blocks of a product.
//
//     n = x·weight (or x), stored as Q8 blocks, as f32, or as both; factor = 1/sqrt(mean(x²) + eps)
// Shapes: x [R, cols] f32; q, meta as in q8_activations.cuh; plain [R, cols] f32; factor [R] f32,
// written only with a norm.
// `quantize_tiles` stores Q8 tiles (q8_tiles.cuh) instead, with zeros in rows R to the tile's end.
// Grid: R blocks, or the rows of all tiles, of 32·WARPS threads. Dynamic shared memory: the staged row. Alignment: 16 bytes.
// Bytes: 4 read and 1.25 to 5.25 written an element.
// The same bits as in a product that stages its own input (stage_activations.cuh), with the same
// number of warps. Twin: `quantize` in tests/quantized_ops.py. Launcher: worker/gpu/activations.py.
#include "pdl.cuh"
#include "q8_tiles.cuh"
#include "stage_activations.cuh"

template <bool STAGE_Q8, bool STAGE_F32, int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
    quantize_rows(const InputRows rows, u8* q, Meta* meta, float* plain, float* factor) {
    extern __shared__ __align__(16) u8 shared[];
    const int cols = rows.cols;
    const size_t row = blockIdx.x;
    StagedRows staged;
    prefetch_norm(rows);
    launch_dependents();
    grid_dependency_wait();
    const float of_row = stage<STAGE_Q8, STAGE_F32, WARPS>(rows, row, 1, shared, staged);
    if (rows.norm && threadIdx.x == 0) factor[row] = of_row;
    if (STAGE_Q8) {
        uint4* to = reinterpret_cast<uint4*>(q + row * cols);
        for (int i = threadIdx.x; i < cols / 16; i += 32 * WARPS) to[i] = reinterpret_cast<const uint4*>(staged.q)[i];
        int2* blocks = reinterpret_cast<int2*>(meta + row * (cols / 32));
        for (int i = threadIdx.x; i < cols / 32; i += 32 * WARPS)
            blocks[i] = reinterpret_cast<const int2*>(staged.meta)[i];
    }
    if (STAGE_F32) {
        float4* to = reinterpret_cast<float4*>(plain + row * cols);
        for (int i = threadIdx.x; i < cols / 4; i += 32 * WARPS) to[i] = reinterpret_cast<const float4*>(staged.x)[i];
    }
}

template <int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
    quantize_tiles(const InputRows rows, const Q8Tiles tiles, int count, float* factor) {
    extern __shared__ __align__(16) u8 shared[];
    const int row = blockIdx.x;
    StagedRows staged;
    prefetch_norm(rows);
    launch_dependents();
    grid_dependency_wait();
    const bool valid = row < count;
    if (valid) {
        const float of_row = stage<true, false, WARPS>(rows, row, 1, shared, staged);
        if (rows.norm && threadIdx.x == 0) factor[row] = of_row;
    }
    for (int i = threadIdx.x; i < tiles.units * 4; i += 32 * WARPS) {
        const int unit = i / 4, c = i % 4;
        const u32* const words = reinterpret_cast<const u32*>(staged.q) + unit * 4 + c;
        const uint2 both = valid ? make_uint2(words[0], words[tiles.units * 4]) : make_uint2(0, 0);
        *reinterpret_cast<uint2*>(tiles.q + tiles.q_offset(row, unit, c)) = both;
        if (c != 0) continue;
        const Meta m = valid ? staged.meta[unit] : Meta{};
        tiles.store_meta(row, unit, m.scale, m.sum[0], m.sum[1]);
    }
}
