// Decode: h[t, j] = gated(W_gate·x + b_gate, W_up·x + b_up): both products and the gate in one launch, of a dense FFN
// or of each of a token's k experts.
//
// A warp takes ROWS rows of both matrices of one expert (`experts` [T, k], null for a dense FFN with k = 1); a block is
// 8 warps, of which `parts` share rows as in matvec.cu. Grid x over rows, y over T·k. Biases are [E, rows] or null.
// Reads each chosen expert's weights once a token. Twins: `norm_glu`, `experts_glu` in worker/cpu/ops.py, without norms.
#include "dots.cuh"
#include "gated.cuh"

constexpr int kWarps = 8;

struct Branch {
    Planes planes;
    const float* bias;
};

template <int ROWS, class G, class U>
__global__ void __launch_bounds__(32 * kWarps)
    glu(const Branch gate, const Branch up, const Activations x, const Gate activation, const int* __restrict__ experts,
        const int k, const int rows, const int parts, float* __restrict__ out) {
    __shared__ float partial[kWarps][2 * ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp & (parts - 1);
    const int first = (blockIdx.x * (kWarps / parts) + warp / parts) * ROWS;
    const int expert = experts ? experts[blockIdx.y] : 0;
    const Activations input = x.row(blockIdx.y / k);
    const int g_units = x.cols / Unit<G>::kElements, u_units = x.cols / Unit<U>::kElements;
    float g[ROWS] = {}, u[ROWS] = {};
    if (first < rows) {
        add_dots<G, ROWS>(g, gate.planes, (u32)expert * rows * g_units, first, rows - 1, input, g_units, part, parts);
        add_dots<U, ROWS>(u, up.planes, (u32)expert * rows * u_units, first, rows - 1, input, u_units, part, parts);
    }
    sum_lanes(g);
    sum_lanes(u);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
        if (lane == r) partial[warp][r] = g[r], partial[warp][ROWS + r] = u[r];
    __syncthreads();
    const int row = first + lane;
    if (part != 0 || lane >= ROWS || row >= rows) return;
    float a = partial[warp][lane], b = partial[warp][ROWS + lane];
    for (int i = 1; i < parts; ++i) a += partial[warp + i][lane], b += partial[warp + i][ROWS + lane];
    const size_t at = (size_t)expert * rows + row;
    if (gate.bias) a += gate.bias[at];
    if (up.bias) b += up.bias[at];
    out[(size_t)blockIdx.y * rows + row] = gated(a, b, activation);
}
