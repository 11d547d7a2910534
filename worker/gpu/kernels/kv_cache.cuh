// Where a position's key or value lies: KV blocks of 16 tokens, found through a sequence's block table.
//
// One layer's keys are [blocks, Hk, 16, D] f16 and its values the same, so one head's part of a KV block is one piece of
// 16·D·2 bytes (2, 3 or 4 KiB) and every row of it starts at a multiple of 16 bytes.
#pragma once

constexpr int kKvBlock = 16;

template <int D>
__device__ __forceinline__ size_t kv_offset(int block, int n_kv_heads, int kv_head, int position) {
    return (((size_t)block * n_kv_heads + kv_head) * kKvBlock + position % kKvBlock) * D;
}
