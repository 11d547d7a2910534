// Paged KV cache: KV blocks of 16 tokens, addressed through each sequence's block table.
//
// One layer's keys are [blocks, Hk, 16, D] f16, and so are its values. The rows of one head in one
// KV block are contiguous, 16·D·2 bytes (2, 3, 4 or 8 KiB), and each row is 16-byte aligned. KV_BLOCK
// is defined by worker/gpu/attention.py. Twin: worker/cpu/attention.py.
#pragma once

constexpr int kKvBlock = KV_BLOCK;

template <int D>
__device__ __forceinline__ size_t kv_offset(int block, int n_kv_heads, int kv_head, int position) {
    return (((size_t)block * n_kv_heads + kv_head) * kKvBlock + position % kKvBlock) * D;
}
