// Read n 16-byte words and nothing else: how fast this card reads, the limit of every step that is bound by its weights.
//
// from [n] uint4, n a multiple of 8·grid·block at best (a remainder is left out); out [1] u32, written only where the xor
// of all words is one value, so that no load can be dropped. Any grid, 512 threads; 8 loads in flight a thread; 16-byte
// alignment. Bytes: 16·n read. It has no twin: it computes nothing.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* from, size_t n, unsigned int* out) {
    unsigned int seen = 0;
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i + 7 * stride < n; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = __ldg(from + i + j * stride);
#pragma unroll
        for (int j = 0; j < 8; ++j) seen ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (seen == 0x5eed) *out = seen;
}
