// A multiplier's slice of a stage of an experts' product on the int8 tensor cores.
#pragma once
#include "experts_mma_sums.cuh"
#include "fp4_unpacker.cuh"

// sums += w·x over one unit. Words: of rows l/4 and l/4 + 8; scales: theirs. FOLDS: scale·kIntBias
// is finite.
template <int NT, bool FOLDS, bool STARTS>
__device__ __forceinline__ void multiply_unit(const Fp4Unpacker& unpacker, u32 upper, u32 lower, float scale0, float scale1,
                                              const PairRecord<kGroups<NT>, STARTS>* x, const int4& bias,
                                              LaneSums<NT>& sums) {
    const int lane = threadIdx.x % 32;
    u32 a[4];
    unpacker.unpack<!STARTS, (NT > 1)>(upper, a[0], a[2]);
    unpacker.unpack<!STARTS, (NT > 1)>(lower, a[1], a[3]);
    const float scales[2] = {scale0, scale1};
    const float offsets[2] = {__fmul_rn(scale0, -kIntBias), __fmul_rn(scale1, -kIntBias)};
#pragma unroll
    for (int r = 0; r < kRecords<NT>; ++r) {
        uint2 b[2];
        float2 x_scale[2];
        if constexpr (kGroups<NT> == 1) {
            b[0] = x[r].b[lane][0], x_scale[0] = *reinterpret_cast<const float2*>(x[r].scales[lane % 4][0]);
        } else {
            const uint4 both = *reinterpret_cast<const uint4*>(x[r].b[lane]);
            const float4 f = *reinterpret_cast<const float4*>(x[r].scales[lane % 4]);
            b[0] = make_uint2(both.x, both.y), b[1] = make_uint2(both.z, both.w);
            x_scale[0] = make_float2(f.x, f.y), x_scale[1] = make_float2(f.z, f.w);
        }
#pragma unroll
        for (int g = 0; g < kGroups<NT> && 2 * r + g < NT; ++g) {
            float(&sum)[4] = sums[2 * r + g];
            float c[4];
            if constexpr (STARTS)
                mma_16x8x32_s8(c, a, b[g].x, b[g].y, *reinterpret_cast<const int4*>(x[r].starts[g][lane % 4]));
            else
                mma_16x8x32_s8(c, a, b[g].x, b[g].y, bias);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float y = FOLDS ? __fmaf_rn(scales[i / 2], c[i], offsets[i / 2])
                                      : __fmul_rn(scales[i / 2], __fsub_rn(c[i], kIntBias));
                sum[i] = __fmaf_rn(y, i % 2 ? x_scale[g].y : x_scale[g].x, sum[i]);
            }
        }
    }
}

// An E8M0 scale as f32, half of it since codes are doubled (scales.cuh): denormals are zeros.
__device__ __forceinline__ float half_scale(const u8* e) { return __int_as_float(max(*e - 1, 0) << 23); }

// What a warp needs to multiply its slice of a stage, the units of chains w and w + 16.
struct StageReader {
    int slice, units, codes, scales;  // bytes from a slot to the lane's row of `ldmatrix` and its scales
    __device__ __forceinline__ StageReader(int slice, int row_units) : slice(slice), units(row_units) {
        const int lane = threadIdx.x % 32;
        // Matrices: rows 0-7 and 8-15 of the unit of chain w, then of chain w + 16.
        codes = row_offset(lane % 16, units) + (slice + lane / 16 * 16) * 16;
        scales = stage_codes_bytes(units) + lane / 4 * units + slice;
    }
    // sums = w·x of the slice. `slot`: in shared memory, `slot_bytes` the same.
    template <int NT, bool FOLDS, bool STARTS>
    __device__ __forceinline__ void multiply(const Fp4Unpacker& unpacker, u32 slot, const u8* slot_bytes,
                                             const PairRecord<kGroups<NT>, STARTS>* records, const int4& bias,
                                             LaneSums<NT>& sums) const {
        constexpr int kStep = 16 * kRecords<NT>;
        LaneSums<NT> a = {}, b = {};
        const PairRecord<kGroups<NT>, STARTS>* x = records + slice * kRecords<NT>;
        const u8 *scale = slot_bytes + scales, *const upper = scale + 8 * units;
        u32 words[4], at = slot + codes;
        load_matrices(words, at);
        int u = slice;
        const u8* scale8 = upper;
#pragma unroll 1
        for (; u + 16 < units; u += 32, x += 2 * kStep, scale += 32, scale8 += 32) {
            const u32 now[4] = {words[0], words[1], words[2], words[3]};
            const float s[4] = {half_scale(scale), half_scale(scale8), half_scale(scale + 16), half_scale(scale8 + 16)};
            at += 32 * 16;
            if (u + 32 < units) load_matrices(words, at);
            multiply_unit<NT, FOLDS, STARTS>(unpacker, now[0], now[1], s[0], s[1], x, bias, a);
            multiply_unit<NT, FOLDS, STARTS>(unpacker, now[2], now[3], s[2], s[3], x + kStep, bias, b);
        }
        if (u < units)
            multiply_unit<NT, FOLDS, STARTS>(unpacker, words[0], words[1], half_scale(scale), half_scale(scale8), x, bias, a);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] = __fadd_rn(a[n][i], b[n][i]);
    }
};

// Whether a sum of the warp is infinite or NaN.
template <int NT>
__device__ __forceinline__ bool any_overflow(const LaneSums<NT>& sums) {
    float zero = 0.f;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) zero = __fmaf_rn(sums[n][i], 0.f, zero);
    return __ballot_sync(0xffffffffu, zero != 0.f);
}
