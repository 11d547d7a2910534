// Benchmark: read n 16-byte words, to measure the read bandwidth of the device, which limits every
// decode step.
//
// Shapes: from [n] uint4, n a multiple of 8·threads of the grid (a remainder is not read); out [1]
// u32, written only if the XOR of all words is one given value, so that no load can be removed.
// Grid: any, 512 threads; 8 loads in flight a thread.
// Alignment: 16 bytes. Bytes: 16·n read. Twin: none. Launcher: worker/gpu/bandwidth.py.
extern "C" __global__ void __launch_bounds__(READ_THREADS) read_all(const uint4* from, size_t n, unsigned int* out) {
    unsigned int seen = 0;
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i + (READ_LOADS - 1) * stride < n;
         i += READ_LOADS * stride) {
        uint4 v[READ_LOADS];
#pragma unroll
        for (int j = 0; j < READ_LOADS; ++j) v[j] = __ldg(from + i + j * stride);
#pragma unroll
        for (int j = 0; j < READ_LOADS; ++j) seen ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (seen == 0x5eed) *out = seen;
}
