"""A GPU inference worker: takes jobs from a Redis stream, publishes tokens on a stream per job.

`Client`, `SyncClient` and `Job` are the API for orchestrators. They are imported on first use,
without the engine or any GPU library. To read the code, start with docs/architecture.md.
"""

from importlib import import_module
from typing import Any

__version__ = "0.3.0"
__all__ = ["Client", "Job", "SyncClient", "__version__"]

_MODULES = {"Client": "worker.jobs.client", "SyncClient": "worker.jobs.client", "Job": "worker.jobs.protocol"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
