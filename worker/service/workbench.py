"""What every attempt of a worker works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from worker.backend import MemoryUse
from worker.config import ServiceSection
from worker.jobs.transport import Transport
from worker.runtime import LoadedModel
from worker.service.engine_thread import EngineThread
from worker.service.quiet import Quiet
from worker.telemetry import Log, Metrics


@dataclass(frozen=True, slots=True)
class Workbench:
    """The tools, made once; see `service.py`."""

    transport: Transport
    engine: EngineThread
    served: LoadedModel
    section: ServiceSection
    renew_s: float
    meters: Metrics
    log: Log
    memory: Callable[[], MemoryUse]
    """The newest figures; asks no device."""
    quiet: Quiet
    """Ends with a job's first token."""
