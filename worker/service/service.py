"""The life of a worker: start, claim and run jobs, drain, stop.

    starting ─► ready ◄─► busy ─► draining ─► (exit 0)          any ─► failed ─► (exit 1 or 2)

Everything here runs on one event loop, which no call may block. Read next: `attempt.py` (one job),
`engine_thread.py` (the device), `reporter.py` (what a worker reports about itself).
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from worker import __version__
from worker.config import HttpSection, LeaseSection, ServiceSection
from worker.errors import CudaError, Internal, ServerRefused, WorkerError
from worker.jobs import events
from worker.jobs.lease import Claim
from worker.jobs.streams import Disconnected
from worker.jobs.transport import Transport
from worker.runtime import LoadedModel, ModelLoader
from worker.service.attempt import Attempt
from worker.service.engine_thread import EngineThread
from worker.service.flush_loop import FlushLoop
from worker.service.generation import WorkerContext
from worker.service.health import Health, StatusServer
from worker.service.lane import Lane
from worker.service.prepared_job import StopReason
from worker.service.renewal_loop import RenewalLoop
from worker.service.reporter import Reporter
from worker.telemetry import Log, Metrics, frames_of

if TYPE_CHECKING:
    from worker.tracing.otlp import Tracing

T = TypeVar("T")

_DEVICE_LOST = 2
_SERVER_UNREACHABLE = 5
_SHUTDOWN_S = 1.0
_HAND_BACK_S = 3.0
"""For handing the job back after the grace period; it takes longer only without a server."""
_CANCEL_S = 0.5
"""The same after a second signal."""
_WATCHDOG_TICK_S = 1.0
_ADMISSION_TICK_S = 0.01
"""Interval of looking whether the claimed jobs have KV blocks."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker serves, and how long it waits for the server at the start."""

    model: str
    """As requested; the model's own name is known when it is loaded."""
    backend: str
    queue: str
    """The names of the queues, separated by commas."""
    name: str
    """The first part of the worker's id, and a target of the `drain` command."""
    patience_s: float


class Service:
    """One worker. Call `run` once; `signal` may be called on its loop at any time."""

    def __init__(
        self,
        assignment: Assignment,
        section: ServiceSection,
        lease: LeaseSection,
        http: HttpSection,
        transport: Transport,
        load: ModelLoader,
        log: Log,
        tracing: "Tracing | None" = None,
    ) -> None:
        self._tracing = tracing
        self._assignment = assignment
        self._section = section
        self._lease = lease
        self._http = http
        self._transport = transport
        self._load = load
        self._log = log
        self._metrics = Metrics()
        self._health = Health(self._metrics, lambda: transport.seconds_since_contact, 3 * lease.scan_s)
        self._reporter = Reporter(transport.registration, self._health, section, self._metrics, log)
        self._engine = EngineThread()
        self._attempts: set[Attempt] = set()
        self._claim_lock = asyncio.Lock()
        self._drain_reason = ""
        self._grace_s = 0.0
        self._draining = asyncio.Event()
        self._hurried = asyncio.Event()
        self.http_port = 0
        """The port of the health pages, once `run` listens."""

    def signal(self, reason: str) -> None:
        """Handle SIGTERM or SIGINT: drain on the first signal, stop immediately on the second."""
        if self._draining.is_set():
            self._hurried.set()
        else:
            self._begin_drain(reason)

    async def run(self) -> int:
        """Serve until drained; returns the exit code: 0, 1 after a fault, 2 if the device is lost.

        The exit code in the log and in `stopped` is that of the process, also after a raise.

        Raises:
            WorkerError: ModelLoadFailed, InsufficientVram or ConfigInvalid, before the first job.
            Disconnected: the server was unreachable at the start.
        """
        http = StatusServer(self._health.pages())
        await http.open(self._http.host, self._http.port)
        self.http_port = http.port
        reports = [
            asyncio.create_task(self._forever(loop)) for loop in (self._reporter.publish, self._reporter.heartbeat)
        ]
        code = 1
        try:
            code = await self._serve()
        except CudaError as error:
            self._fail(error)
            code = _DEVICE_LOST
        except WorkerError as error:
            self._fail(error)
            code = error.exit_code
            raise
        except Disconnected:
            code = _SERVER_UNREACHABLE
            raise
        except Exception as error:
            self._log.error("worker_fault", frames=frames_of(error))
            self._fail(Internal(f"{type(error).__name__} in the service"))
        finally:
            await self._close(code, reports, http)
        return code

    async def _close(self, code: int, reports: Iterable[asyncio.Task[NoReturn]], http: StatusServer) -> None:
        """Report the exit code, then end the reports, the engine, the pages and the connections."""
        self._log.info("worker_stopped", exit_code=code)
        self._reporter.send(events.Stopped(reason=self._drain_reason or self._health.state, exit_code=code))
        await self._reporter.flush(_SHUTDOWN_S)
        for task in reports:
            task.cancel()
        self._engine.stop()
        await http.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHUTDOWN_S):
                await self._transport.close()

    def join_engine(self, timeout_s: float) -> bool:
        """Wait for the engine's thread to end; returns whether it has. Blocks the caller."""
        return self._engine.join(timeout_s)

    def _forever(self, work: Callable[[], Coroutine[Any, Any, None]]) -> Coroutine[Any, Any, NoReturn]:
        return run_forever(work, self._lease.scan_s, self._log)

    async def _serve(self) -> int:
        model = await self._start()
        if model is None:
            return 0
        context = WorkerContext(
            self._transport,
            self._engine,
            model,
            self._section,
            self._metrics,
            self._log,
            lambda: self._health.memory,
            self._reporter.first_token_gate,
            FlushLoop(self._transport, self._section.flush_ms),
            RenewalLoop(self._transport, self._lease.renew_s, self._log, self._reporter.refusals),
            self._reporter.speed,
            self._tracing,
        )
        return await first_completed(
            self._run_jobs(context),
            self._watch_engine(),
            self._end_drain(),
            self._forever(self._obey_commands),
            self._forever(lambda: self._reporter.watch_memory(self._engine, model)),
            self._forever(lambda: self._reporter.watch_queues(self._transport.queue_depths)),
            self._forever(lambda: self._reporter.check_residency(self._engine, model)),
        )

    async def _start(self) -> LoadedModel | None:
        """Load the model and connect to the server concurrently; None if a drain begins first."""
        began, loop = time.monotonic(), asyncio.get_running_loop()
        self._log.info("worker_starting", version=__version__, http_port=self.http_port)
        assigned = self._assignment
        self._reporter.starting(assigned.model, assigned.backend, assigned.name, assigned.queue, self.http_port)

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(self._reporter.loading, done, total)

        loading = asyncio.ensure_future(self._engine.call(lambda: self._load(progress)))
        needed = asyncio.gather(loading, self._connect())
        needed.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved if not awaited below
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait((needed, draining), return_when=asyncio.FIRST_COMPLETED)
            if not needed.done():
                return None
            model, _ = await needed
            await asyncio.to_thread(model.tokenizer.prepare)  # it keeps the GIL: not while jobs run
        finally:
            draining.cancel()
            needed.cancel()
        await self._engine.own(model.engine)
        self._ready(model, time.monotonic() - began)
        return model

    async def _connect(self) -> None:
        """Open the transport. Raises Disconnected if the server is unreachable for `patience_s`."""
        patience_s, opening = self._assignment.patience_s, asyncio.ensure_future(self._transport.open())
        try:
            done, _ = await asyncio.wait([opening], timeout=min(_SHUTDOWN_S, patience_s))
            if not done:
                self._log.warning("server_silent", patience_s=patience_s)
                done, _ = await asyncio.wait([opening], timeout=patience_s)
            if not done:
                raise Disconnected(f"no answer for {patience_s:g} s")
            opening.result()
        finally:
            opening.cancel()

    def _ready(self, model: LoadedModel, load_s: float) -> None:
        self._log = self._log.bind(model=model.name, gpu=model.device.device)
        self._metrics.model_load.set(load_s)
        self._reporter.ready(model, load_s)
        self._health.enter("ready")
        if model.warning:
            self._log.warning("model_warning", reason=model.warning)
        self._log.info("worker_ready", load_s=round(load_s, 3), context=model.engine.context)

    async def _run_jobs(self, context: WorkerContext) -> int:
        """Run jobs in `max_running` lanes until the drain.

        Returns the exit code. Raises CudaError if a job loses the device; the other jobs have a
        moment to be left to other workers.
        """
        limit = context.model.engine.settings.max_running
        lanes = [asyncio.create_task(self._run_lane(context)) for _ in range(limit)]
        try:
            running = set(lanes)
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for lane in done:
                    if lane.exception() or lane.result():
                        await asyncio.wait(lanes, timeout=_HAND_BACK_S)
                        return lane.result()
            return 0
        finally:
            for lane in lanes:
                lane.cancel()

    async def _run_lane(self, context: WorkerContext) -> int:
        """Run one job after another until the drain."""
        lane = Lane(self._claim)
        try:
            while lane.claiming or not self._draining.is_set():
                claim = await lane.next_claim()
                if claim is None:
                    continue
                if self._draining.is_set():
                    await self._transport.release(claim)
                elif await self._run_job(context, claim, lane) == "stalled":  # the next claim would return the same job
                    return _DEVICE_LOST
            return 0
        finally:
            lane.close()

    async def _claim(self) -> Claim | None:
        """Claim an entry: one lane at a time, and none while a claimed job waits for KV blocks."""
        async with self._claim_lock:
            if self._draining.is_set():
                return None
            if self._engine.waiting:
                await asyncio.sleep(_ADMISSION_TICK_S)
                return None
            try:
                claim = await self._transport.claim()
            except ServerRefused as error:
                self._reporter.refusals.failed("claim", error)
            except Exception as error:  # an unreadable entry must not end the worker: other entries may be readable
                self._log.error("claim_fault", frames=frames_of(error))
            else:
                self._reporter.refusals.replied("claim", self._transport.queue_refusal)
                return claim
            await asyncio.sleep(self._lease.scan_s)
            return None

    async def _run_job(self, context: WorkerContext, claim: Claim, lane: Lane) -> str:
        def begin_claim() -> None:
            if not self._draining.is_set():
                lane.begin_claim()

        attempt = Attempt(context, claim, begin_claim)
        self._attempts.add(attempt)
        self._health.set_running(len(self._attempts))
        context.first_token_gate.close(on_open=self._reporter.busy)
        try:
            outcome = await attempt.run()
            self._reporter.refusals.succeeded(f"attempt {claim.entry_id}")
        except CudaError:
            raise
        except ServerRefused as error:  # as below
            self._reporter.refusals.failed(f"attempt {claim.entry_id}", error)
            outcome = "fault"
        except Exception as error:  # not even the release succeeded: the job's lease expires
            self._log.error("attempt_fault", job_id=attempt.job_id, frames=frames_of(error))
            outcome = "fault"
        finally:
            self._attempts.discard(attempt)
            self._health.set_running(len(self._attempts))
            context.first_token_gate.open()
        self._metrics.requests.labels(outcome).inc()
        self._health.attempt_ended(outcome)
        self._reporter.job_edge()
        return outcome

    async def _watch_engine(self) -> int:
        """The watchdog: return when the busy engine has completed no step for `stall_s` seconds.

        Time is counted in ticks, so that a process that was suspended does not count the
        suspension. The running job is left to another worker before the return.
        """
        engine, stall_s = self._engine, self._section.stall_s
        tick_s = min(_WATCHDOG_TICK_S, stall_s / 4)
        silent_s, steps = 0.0, engine.steps
        while silent_s < stall_s:
            began = time.monotonic()
            await asyncio.sleep(tick_s)
            passed_s = min(time.monotonic() - began, 2 * tick_s)
            silent_s = silent_s + passed_s if engine.busy and engine.steps == steps else 0.0
            steps = engine.steps
        self._fail(Internal(f"the engine made no step for {stall_s:g} s"))
        self._interrupt(StopReason.STALLED)
        await asyncio.sleep(_HAND_BACK_S)
        return _DEVICE_LOST

    def _interrupt(self, reason: StopReason) -> None:
        for attempt in self._attempts:
            attempt.limits.interrupt(reason)

    def _begin_drain(self, reason: str) -> None:
        if self._draining.is_set():
            return
        running = len(self._attempts)
        self._drain_reason, self._grace_s = reason, self._section.grace_s if running else 0.0
        self._draining.set()
        self._health.enter("draining")
        self._log.info("worker_draining", reason=reason, grace_s=self._grace_s)
        self._reporter.send(events.Draining(reason=reason, grace_s=self._grace_s, running=running))

    async def _end_drain(self) -> int:
        """Return after the drain began, the grace period, and a moment to hand the job back."""
        await self._draining.wait()
        await self._sleep_unless_hurried(self._grace_s)
        self._interrupt(StopReason.DRAIN)
        await self._sleep_unless_hurried(_HAND_BACK_S)
        await asyncio.sleep(_CANCEL_S)
        return 0

    async def _sleep_unless_hurried(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurried.wait()

    async def _obey_commands(self) -> None:
        """Execute operators' commands for this worker and its jobs."""
        async for command in self._transport.registration.commands():
            if command.do == "cancel":
                for attempt in self._attempts:
                    if attempt.job_id == command.target:
                        attempt.limits.interrupt(StopReason.CANCEL)
            elif command.do == "drain" and command.target in (self._transport.worker_id, self._assignment.name):
                self._begin_drain("command")

    def _fail(self, error: WorkerError) -> None:
        """Enter the state `failed`; report and log the error that ends the worker."""
        self._health.enter("failed")
        self._reporter.send(events.ErrorEvent.of(error))
        self._log.error("worker_failed", code=error.code, reason=error.message)


async def first_completed(*coroutines: Coroutine[Any, Any, T]) -> T:
    """Run all; return or raise what the first to complete does, and cancel the others."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_SHUTDOWN_S)


async def run_forever(work: Callable[[], Coroutine[Any, Any, None]], pause_s: float, log: Log) -> NoReturn:
    """Run `work` again and again, and log what it raises. Raises CudaError: the device is lost."""
    while True:
        try:
            await work()
        except CudaError:
            raise
        except Exception as error:
            log.error("background_fault", frames=frames_of(error))
        await asyncio.sleep(pause_s)
