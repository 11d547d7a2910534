"""Emulator of the CUDA kernels on the CPU: g++ instead of NVRTC, host memory instead of a device.

It shows arithmetic, indexing, masks, barriers, alignment, a launch's arguments, and the order of a
captured graph. It cannot show races (but those that the order of fibers decides: `--fibers
backwards`), time, denormals of f64, uninitialized static shared memory, a card's own rounding of
exp and of tensor cores' sums. Next: `plugin.py`, `cuda.h`.
"""
