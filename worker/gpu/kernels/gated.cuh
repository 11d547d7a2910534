// The gate of a gated FFN: gate·σ(alpha·gate)·up; with a limit L, gate ≤ L and -L ≤ up ≤ L before it and up + 1 after.
//
// SwiGLU (Shazeer 2020, arXiv:2002.05202) and gpt-oss's. `limit` is infinity where there is none. Twin: `gated` in
// worker/cpu/plain.py.
#pragma once

struct Gate {
    float limit, alpha;
};

__device__ __forceinline__ float gated(float gate, float up, const Gate g) {
    const bool limited = g.limit < 3e38f;
    gate = limited ? fminf(gate, g.limit) : gate;
    up = limited ? fminf(fmaxf(up, -g.limit), g.limit) + 1.f : up;
    return gate / (1.f + expf(-g.alpha * gate)) * up;
}
