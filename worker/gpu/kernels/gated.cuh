// Activation of a gated FFN: gate·σ(alpha·gate)·up. With a limit L: gate ≤ L and -L ≤ up ≤ L first,
// and up + 1 for up. With GELU: gate·σ(alpha·gate·(1 + kGeluCubic·gate²))·up, without a limit.
//
// SwiGLU (Shazeer 2020, arXiv:2002.05202) and gpt-oss's variant; `limit` is infinity for plain
// SwiGLU. GELU in its tanh form (arXiv:1606.08415), with alpha = 2·√(2/π). NVRTC contracts
// 1 + expf(…) with expf's final multiplication by a power of two; that product is exact, so the
// result does not change.
// Twin: `gated` in worker/cpu/plain.py. Python: `GATE` in worker/gpu/matvec.py.
#pragma once

struct Gate {
    float limit, alpha;
};

constexpr int kGelu = 2;  // values of GLU and GATED: 0 without a gate, 1 with a plain one, 2 with GELU
constexpr float kGeluCubic = 0.044715f;

template <bool GELU = false>
__device__ __forceinline__ float gated(float gate, float up, const Gate g) {
    if (GELU) {
        const float factor = __fmaf_rn(kGeluCubic, __fmul_rn(gate, gate), 1.f);
        return gate / (1.f + expf(__fmul_rn(__fmul_rn(-g.alpha, gate), factor))) * up;
    }
    const bool limited = g.limit < 3e38f;
    gate = limited ? fminf(gate, g.limit) : gate;
    up = limited ? __fadd_rn(fminf(fmaxf(up, -g.limit), g.limit), 1.f) : up;
    return gate / (1.f + expf(-g.alpha * gate)) * up;
}
