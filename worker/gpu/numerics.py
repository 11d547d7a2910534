"""The facts that decide the bits of a GPU worker's results.

Two workers whose facts are equal compute equal tokens and log-probabilities from equal inputs. The
number of multiprocessors is not among them: no order of sums depends on it. Next: `compiler.py`,
`attention.py`, `sampler.py`.
"""

from worker.backend import host_facts, source_digest
from worker.gpu.compiler import OPTIONS, defines_of, launcher_modules
from worker.model import KvType


def numerics(arch: str, nvrtc_version: str, kv_type: KvType = "f16", *, wgmma: bool) -> dict[str, str]:
    """Flat facts, by name, of a device of compute capability `arch` (such as sm_90).

    `sources` covers kernels, launchers and adapters. FIXED_ORDERS of launcher modules are reported
    by name. `wgmma`: see `Launcher`.
    """
    files = {file for module in launcher_modules() for file, _ in module.INSTANTIATIONS}
    orders = {name: order for module in launcher_modules() for name, order in _fixed_orders(module).items()}
    return {
        "backend": "cuda",
        "compute_capability": arch.removeprefix("sm_"),
        "nvrtc": nvrtc_version,
        "kv_type": kv_type,
        "options": " ".join(OPTIONS),
        "defines": "; ".join(f"{file} {' '.join(options)}" for file in sorted(files) if (options := defines_of(file))),
        "sources": source_digest("gpu"),
        **host_facts(),
        "product_splits": "split of K and order of its sums by the shape of the matrix",
        "prefill_products": "wgmma, one chain of sums" if wgmma else "mma.sync, split by the shape",
        **dict(sorted(orders.items())),
    }


def _fixed_orders(module: object) -> dict[str, str]:
    return dict(getattr(module, "FIXED_ORDERS", {}))
