// Decode: write the keys and values of all rows of a step, before the attention of any of them.
//
//   K[slot, p] = rope(k[r], p), V[slot, p] = v[r] (f16), with p the position of row r's slot
// Needed if a sequence has several rows in a step, that is with draft tokens: attention_rows.cu reads
// the keys before a row's own from the cache. It writes a row's own key and value once more, with
// the same bits.
//
// Inputs: k, v [R, Hk·D] f32; row_slots [R] i32; of the slots, positions [S] i32 and tables
// [S, table_stride] i32; cos, sin [context, dims/2] f32. Outputs: caches as in kv_cache.cuh. Nothing
// is written for an inactive row (attention_items.cu).
// Grid (R, Hk), block D. Row slots, positions and tables are read before the wait (pdl.cuh, rule 1).
// The next launch starts after the writes (rule 5), since it reads the cache before its wait.
// Bytes: 12 a KV element.
// Twin: `KvCache.write` in worker/cpu/attention.py with an f16 cache.
#include "half.cuh"
#include "kv_cache.cuh"
#include "pdl.cuh"
#include "rope.cuh"

template <int D, bool ADJACENT>
__global__ void __launch_bounds__(D)
    kv_rows(const float* k, const float* v, unsigned short* k_cache, unsigned short* v_cache, const float* cos,
            const float* sin, int dims, const int* row_slots, const int* positions, const int* tables,
            int table_stride) {
    const int row = blockIdx.x, kv_head = blockIdx.y, element = threadIdx.x;
    const int slot = row_slots[row], position = slot < 0 ? -1 : positions[slot];
    const bool active = (unsigned int)position < (unsigned int)(table_stride * kKvBlock);
    Rotation rotation;
    size_t to;
    if (active) {
        rotation = rotation_of<ADJACENT>(element, position, RopeTables{cos, sin, dims});
        const int block = tables[(size_t)slot * table_stride + position / kKvBlock];
        to = kv_offset<D>(block, gridDim.y, kv_head, position) + element;
    }
    grid_dependency_wait_only();
    if (active) {
        const size_t head = ((size_t)row * gridDim.y + kv_head) * D;
        const float key = rotate(k[head + element], k[head + rotation.partner], rotation);
        k_cache[to] = float_to_half(clamp_to_half_range(key));
        v_cache[to] = float_to_half(clamp_to_half_range(v[head + element]));
    }
    __threadfence();
    launch_dependents();
}
