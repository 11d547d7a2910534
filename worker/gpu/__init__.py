"""The GPU backend: launchers of every op over CUDA kernels of this project's own, and a runner over them.

Nothing outside this package imports CuPy, and nothing imports this package unless the GPU was chosen. Start with
`memory.py` and `compiler.py`; the kernels and their layouts stand in `kernels/`.
"""
