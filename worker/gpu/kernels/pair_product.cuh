// The experts' products of decode for pairs of a row and an expert: operands and results.
//
// GATED: h[p] = gated(W_gate·n[p/k] + b_gate, W_up·n[p/k] + b_up).
// Otherwise: y[p] = weights[p]·(W·h[p] + b).
// Shapes: W [E, rows, cols] in planes; biases [E, rows] f32 or null; input rows as Q8 blocks
// (q8_activations.cuh), n [R, cols] with a factor each, or h [R·k, cols]; h as f32 and as Q8 blocks
// (q and meta are null unless rows is a multiple of 32), y [R·k, rows] f32. Rows of inactive pairs
// are not written.
// Users: grouped_experts.cu, experts_mma.cu. Python: `_PRODUCT` in worker/gpu/decode_experts.py.
#pragma once
#include "gated.cuh"
#include "q8_activations.cuh"

struct PairProduct {
    Planes planes[2];      // gate and up, or one matrix
    const float* bias[2];  // [E, rows] or null
    const u8* q;
    const Meta* meta;
    const float* factor;   // [R] or null
    const float* weights;  // [R·k]; null with GATED
    float* out;
    u8* out_q;
    Meta* out_meta;
    int rows, cols, pairs_per_row;
    Gate gate;
};

// h of one element a lane: the warp holds 32 elements of a pair, the first one a multiple of 32.
template <bool GELU = false>
__device__ __forceinline__ void store_gated(const PairProduct& p, size_t pair, int column, float gate, float up,
                                            float factor, float gate_bias, float up_bias) {
    const bool stored = column < p.rows;
    const float h = stored ? gated<GELU>(__fmaf_rn(gate, factor, gate_bias), __fmaf_rn(up, factor, up_bias), p.gate) : 0.f;
    if (stored) p.out[pair * p.rows + column] = h;
    if (p.out_q)
        store_quantized_lane(h, column, p.rows, p.out_q + pair * p.rows, p.out_meta + pair * (p.rows / 32));
}

// y of one row.
__device__ __forceinline__ void store_weighted(const PairProduct& p, size_t pair, int row, float sum, float weight,
                                               float bias) {
    if (row < p.rows) p.out[pair * p.rows + row] = __fmul_rn(weight, __fadd_rn(sum, bias));
}
