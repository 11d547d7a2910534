"""The CPU backend: a NumPy twin of every op, which is that op's definition, and a runner over them."""
