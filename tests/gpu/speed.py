"""What a decode step has to move, and how fast this card reads: the two numbers beside every speed.

Bytes moved are those that no kernel can avoid: each weight once, of a mixture only the experts in use, one row of an
embedding that is not also the output head, and the keys and values that the token attends to.
"""

from __future__ import annotations

import math

from worker.gguf_file import GgufFile

READ_ALL = r"""
extern "C" __global__ void read_all(const uint4* from, size_t n, unsigned int* out) {
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
"""
READ = 2 << 30
RUNS = 7


def read_bandwidth():
    """Bytes a second that a kernel reads which does nothing else: the best of RUNS over 2 GiB."""
    import cupy

    from worker.gpu.memory import DeviceMemory, Purpose

    data = DeviceMemory().reserve(READ, Purpose.WORKSPACE).array((READ,), "u1")
    data.fill(1)
    kernel, out = cupy.RawKernel(READ_ALL, "read_all"), cupy.zeros(1, "u4")
    processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    began, ended = cupy.cuda.Event(), cupy.cuda.Event()
    milliseconds = []
    for run in range(2 * RUNS):
        began.record()
        kernel((processors * (4 << run % 3),), (512,), (data, cupy.uint64(READ // 16), out))
        ended.record()
        ended.synchronize()
        milliseconds.append(cupy.cuda.get_elapsed_time(began, ended))
    return READ / min(milliseconds) * 1e3


def decode_bytes(path, hp, position):
    """Bytes that the token at `position` moves."""
    with GgufFile.open(path) as file:
        tied = "output.weight" not in file.tensors
        total = sum(_weight_bytes(info, hp, tied) for info in file.tensors.values())
    windowed = -(-hp.block_count // 2) if hp.architecture == "gpt-oss" else 0  # the even layers
    seen = (hp.block_count - windowed) * position + windowed * min(position, hp.sliding_window)
    return total + 2 * 2 * hp.kv_width * seen


def _weight_bytes(info, hp, tied):
    if info.name == "token_embd.weight" and not tied:
        return info.nbytes // math.prod(info.shape[:-1])
    if "_exps." in info.name:
        return info.nbytes * hp.expert_used_count // hp.expert_count
    return info.nbytes
