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

template <bool GELU>
__device__ __forceinline__ bool is_limited(const Gate g) {
    return !GELU && g.limit < 3e38f;
}

__device__ __forceinline__ void limit(float& gate, float& up, const Gate g) {
    gate = fminf(gate, g.limit);
    up = __fadd_rn(fminf(fmaxf(up, -g.limit), g.limit), 1.f);
}

// The reciprocal of σ(…).
template <bool GELU>
__device__ __forceinline__ float inverse_sigmoid(float gate, const Gate g) {
    if (!GELU) return 1.f + expf(-g.alpha * gate);
    const float factor = __fmaf_rn(kGeluCubic, __fmul_rn(gate, gate), 1.f);
    return 1.f + expf(__fmul_rn(__fmul_rn(-g.alpha, gate), factor));
}

template <bool GELU = false>
__device__ __forceinline__ float gated(float gate, float up, const Gate g) {
    if (is_limited<GELU>(g)) limit(gate, up, g);
    return gate / inverse_sigmoid<GELU>(gate, g) * up;
}

// a / b for 2^-27 ≤ |a| < 2^30 and 1 ≤ b ≤ infinity, correctly rounded except for the sign of a
// zero. The compiler's division has the same steps, but a branch for operands near the ends of
// f32's range; here a power of two brings b below 2^70 (infinity: to 2^100, so that the quotient is
// zero).
__device__ __forceinline__ float branchless_quotient(float a, float b) {
    const float power = b > 0x1p60f ? 0x1p-60f : 1.f;
    b = fminf(__fmul_rn(b, power), 0x1p100f);
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
    r = __fmaf_rn(r, __fmaf_rn(-b, r, 1.f), r);
    const float q = __fmul_rn(a, r);
    return __fmul_rn(__fmaf_rn(r, __fmaf_rn(-b, q, a), q), power);
}

// gate[i] = gated(gate[i], up[i]), except for the sign of a zero; one branch for all, so that their
// latencies overlap.
template <bool GELU, int N>
__device__ __forceinline__ void gated(float (&gate)[N], float (&up)[N], const Gate g) {
    if (is_limited<GELU>(g)) {
#pragma unroll
        for (int i = 0; i < N; ++i) limit(gate[i], up[i], g);
    }
    float inverse[N], quotient[N], smallest = 1.f, largest = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        inverse[i] = inverse_sigmoid<GELU>(gate[i], g);
        smallest = fminf(smallest, fabsf(gate[i])), largest = fmaxf(largest, fabsf(gate[i]));
        quotient[i] = branchless_quotient(gate[i], inverse[i]);
    }
    if (smallest < 0x1p-27f || largest >= 0x1p30f) {
#pragma unroll
        for (int i = 0; i < N; ++i) quotient[i] = gate[i] / inverse[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) gate[i] = __fmul_rn(quotient[i], up[i]);
}
