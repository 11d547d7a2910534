"""The facts that decide the bits of a GPU worker's results.

Two workers whose facts are equal compute equal tokens and log-probabilities from equal inputs. The
number of multiprocessors is not among them: no order of sums depends on it. Next: `compiler.py`,
`attention.py`, `sampler.py`.
"""

import hashlib
from importlib import resources

from worker.gpu.compiler import OPTIONS, defines_of, launcher_modules


def numerics(arch: str, nvrtc_version: str) -> dict[str, str]:
    """Flat facts, by name, of a device of compute capability `arch` (such as sm_90).

    `sources` is the digest of all kernel files and of the modules that launch them, which hold the
    rules that choose a product's split of K. FIXED_ORDERS of those modules are reported by name.
    """
    files = {file for module in launcher_modules() for file, _ in module.INSTANTIATIONS}
    orders = {name: order for module in launcher_modules() for name, order in _fixed_orders(module).items()}
    return {
        "backend": "cuda",
        "compute_capability": arch.removeprefix("sm_"),
        "nvrtc": nvrtc_version,
        "options": " ".join(OPTIONS),
        "defines": "; ".join(f"{file} {' '.join(options)}" for file in sorted(files) if (options := defines_of(file))),
        "sources": _sources_digest(),
        "product_splits": "split of K and order of its sums by the shape of the matrix",
        **dict(sorted(orders.items())),
    }


def _fixed_orders(module: object) -> dict[str, str]:
    return dict(getattr(module, "FIXED_ORDERS", {}))


def _sources_digest() -> str:
    package = resources.files(__package__)
    launchers = [package / f"{module.__name__.rpartition('.')[2]}.py" for module in launcher_modules()]
    kernels = [file for file in (package / "kernels").iterdir() if file.name.endswith((".cu", ".cuh"))]
    digest = hashlib.sha256()
    for file in sorted([*kernels, *launchers], key=lambda file: file.name):
        text = file.read_bytes()
        digest.update(f"{file.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()
