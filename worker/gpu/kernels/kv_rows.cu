// Decode: write the keys and values of all rows of a step, before the attention of any of them.
//
//   K[slot, p] = rope(k[r], p), V[slot, p] = v[r], with p the position of row r's slot
// With F16Kv it precedes steps in which a sequence has several rows, that is with draft tokens:
// attention_rows.cu reads the keys before a row's own from the cache, and writes a row's own key
// and value once more, with the same bits. With Q8Kv it precedes every step of several rows, and a
// step of one row with heads of 512 elements: attention reads a row's own key and value too.
//
// Inputs: k, v [R, Hk·D] f32; row_slots [R] i32; of the slots, positions [S] i32 and tables
// [S, table_stride] i32; cos, sin [context, dims/2] f32. Outputs: caches as in kv_cache.cuh.
// Nothing is written for an inactive row (attention_items.cu).
// Grid (R, Hk), block D; with Q8Kv a warp for the key and one for the value. Row slots, positions
// and tables are read before the wait (pdl.cuh, rule 1).
// The next launch starts after the writes (rule 5), since it reads the cache before its wait.
// Bytes: 12 a KV element.
// Twin: `KvCache.write` in worker/cpu/kv_cache.py with an f16 cache.
#include "half.cuh"
#include "kv_cache.cuh"
#include "pdl.cuh"
#include "rope.cuh"

template <int D, bool ADJACENT, class Kv>
__global__ void __launch_bounds__(Kv::kQuantized ? 64 : D)
    kv_rows(const float* k, const float* v, typename Kv::Element* k_cache, typename Kv::Element* v_cache,
            const float* cos, const float* sin, int dims, const int* row_slots, const int* positions, const int* tables,
            int table_stride) {
    const int row = blockIdx.x, kv_head = blockIdx.y, element = threadIdx.x;
    const int slot = row_slots[row], position = slot < 0 ? -1 : positions[slot];
    const bool active = (unsigned int)position < (unsigned int)(table_stride * kKvBlock);
    const RopeTables rope = {cos, sin, dims};
    if constexpr (Kv::kQuantized) {
        const bool is_key = threadIdx.x < 32;
        WarpRotation<D, ADJACENT> rotation;
        unsigned char* to;
        if (active) {
            if (is_key) rotation.load(position, rope);
            const int block = tables[(size_t)slot * table_stride + position / kKvBlock];
            to = (is_key ? k_cache : v_cache) + Kv::template row<D>(block, gridDim.y, kv_head, 0);
        }
        grid_dependency_wait_only();
        if (active) {
            const size_t head = ((size_t)row * gridDim.y + kv_head) * D;
            float x[D / 32];
            if (is_key) rotation.rotate_head(x, k + head);
#pragma unroll
            for (int i = 0; i < D / 32; ++i)
                if (!is_key) x[i] = v[head + threadIdx.x % 32 + 32 * i];
            Q8Row<D>(x).store(to, position);
        }
    } else {
        Rotation rotation;
        size_t to;
        if (active) {
            rotation = rotation_of<ADJACENT>(element, position, rope);
            const int block = tables[(size_t)slot * table_stride + position / kKvBlock];
            to = Kv::template row<D>(block, gridDim.y, kv_head, position) + element;
        }
        grid_dependency_wait_only();
        if (active) {
            const size_t head = ((size_t)row * gridDim.y + kv_head) * D;
            const float key = rotate(k[head + element], k[head + rotation.partner], rotation);
            k_cache[to] = float_to_half(clamp_to_half_range(key));
            v_cache[to] = float_to_half(clamp_to_half_range(v[head + element]));
        }
    }
    __threadfence();
    __syncthreads();  // the first thread that calls launch_dependents calls it for its block
    launch_dependents();
}
