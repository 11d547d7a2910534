"""The GPU backend: launchers of every op over this project's CUDA kernels, and a runner over them.

- `backend.py`: the device as the worker sees it; `upload.py` brings the weights.
- `runner.py`: the model runner: prepares memory and kernels, captures the CUDA graphs of a prompt's
  chunk and of a decode step, runs steps, and launches one step ahead.
- `memory.py`: every allocation of VRAM, accounted by purpose; `state.py`: KV cache and step inputs.
- `compiler.py`, `kernel.py`, `launch.py`: from a kernel file to a launch; kernels: `kernels/`.
- `decode_ops.py`, `prefill_ops.py`: ops as compositions of launchers (`attention.py`, `matvec.py`,
  `matmul.py`, …); `sampler.py`: from logits to tokens.
- `numerics.py`: the facts that decide the bits of the results.

No other package imports CuPy, and this package is imported only if the GPU was chosen.
"""
