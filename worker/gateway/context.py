"""What all requests of a gateway process share, and what one request carries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from starlette.requests import Request

from worker.config import GatewaySection
from worker.errors import ServerRefused
from worker.gateway.keys import ApiKeys, Caller
from worker.gateway.metrics import GatewayMetrics
from worker.gateway.models import ModelRegistry
from worker.jobs.client import Client
from worker.telemetry import Log, Refusals, frames_of

if TYPE_CHECKING:
    from worker.tracing.otlp import Tracing

_CLOSE_S = 5.0


@dataclass(eq=False)
class GatewayContext:
    """The shared objects of one process, within one event loop."""

    section: GatewaySection
    client: Client
    keys: ApiKeys
    log: Log
    lease_s: float = 4.0
    """The setting `lease.lease_s` of the workers."""
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    tracing: Tracing | None = None
    """None if no spans are sent."""
    draining: bool = False
    """New requests are refused with status 503."""
    stopping: bool = False
    """The grace period is over: open requests end with an error."""
    open_requests: int = 0
    models: ModelRegistry = field(init=False)
    refusals: Refusals = field(init=False)
    _on_stop: set[Callable[[], object]] = field(default_factory=set)
    _background: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        section = self.section
        self.refusals = Refusals(self.log)
        self.models = ModelRegistry(self.client, section.registry_s, section.no_worker_s, section.models)

    def log_failure(self, event: str, failure: Exception, code: str | None, **fields: object) -> None:
        """Log the frames of an internal error, or the reason of a refusal by the server."""
        if code == "internal_error":
            self.log.error(event, **fields, frames=frames_of(failure))
        elif isinstance(failure, ServerRefused):
            self.refusals.failed("request", failure)

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that outlives its request, such as a cancellation."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    @contextlib.contextmanager
    def on_stop(self, action: Callable[[], object]) -> Iterator[None]:
        """Call `action` if `stop` is called within the block."""
        self._on_stop.add(action)
        try:
            yield
        finally:
            self._on_stop.discard(action)

    def stop(self) -> None:
        """Break off the open requests. Their jobs go on."""
        self.stopping = True
        for action in tuple(self._on_stop):
            action()

    async def close(self) -> None:
        """Wait briefly for background work, then close the client's connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.gather(*self._background, return_exceptions=True)
        await self.client.close()


@dataclass(slots=True)
class Call:
    """One HTTP request: who sent it, and the headers that concern its jobs."""

    request_id: str
    """`X-Request-Id`, generated without one; the jobs' correlation id."""
    caller: Caller
    received_s: float
    """`time.monotonic` of its arrival."""
    traceparent: str | None = None
    """What the request's jobs continue: its span, or what its header names."""
    idempotency_key: str | None = None
    last_event_id: str | None = None
    job_id: str | None = None
    """The id of the request's first job, for the log."""
    job_ids: Sequence[str] = ()
    model: str | None = None
    """The model that its first job names."""


def context_of(request: Request) -> GatewayContext:
    """The context of the process that received the request."""
    return cast("GatewayContext", request.app.state.context)


def call_of(request: Request) -> Call:
    """The call that `app.py` made from the request's headers."""
    return cast("Call", request.scope["gateway.call"])
