"""The life of a worker: start, claim and carry one job after another, drain, stop.

    starting ─► ready ◄─► busy ─► draining ─► (exit 0)          any ─► failed ─► (exit 1 or 2)

One job is `attempt.py`'s, what is told about the worker `reporter.py`'s, the device belongs to
`engine_thread.py`. Everything here runs on one event loop, which nothing may hold up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NoReturn

from worker import __version__
from worker.config import HttpSection, LeaseSection, ServiceSection
from worker.errors import CudaError, Internal, WorkerError
from worker.jobs.events import Draining, ErrorEvent, Stopped
from worker.jobs.lease import Claim
from worker.jobs.streams import Disconnected
from worker.jobs.transport import Transport
from worker.runtime import LoadedModel, ModelLoader
from worker.service.attempt import Attempt
from worker.service.bounds import Stop
from worker.service.drain import Drain
from worker.service.engine_thread import EngineThread
from worker.service.health import Health
from worker.service.http_status import TEXT, StatusServer, json_answer
from worker.service.reporter import Reporter
from worker.service.side_by_side import first_of, for_ever
from worker.service.watchdog import stalled
from worker.service.workbench import Workbench
from worker.telemetry import Log, Metrics, frames_of

_LOST_DEVICE = 2
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is to do, and how long it waits for the server at the start."""

    model: str
    """As it was asked for; its own name is known when it is loaded."""
    backend: str
    queue: str
    name: str
    """The first part of the worker's id: `drain` hears it too."""
    patience_s: float


class Service:
    """One worker. `run` it once; `signal` may be called from its loop at any time."""

    def __init__(
        self,
        assignment: Assignment,
        section: ServiceSection,
        lease: LeaseSection,
        http: HttpSection,
        transport: Transport,
        load: ModelLoader,
        log: Log,
    ) -> None:
        self._assignment = assignment
        self._section = section
        self._lease = lease
        self._http = http
        self._transport = transport
        self._load = load
        self._log = log
        self._meters = Metrics()
        self._health = Health(self._meters, lambda: transport.seconds_since_contact, 3 * lease.scan_s)
        self._reporter = Reporter(transport.registration, self._health, section, self._meters, log)
        self._engine = EngineThread()
        self._attempt: Attempt | None = None
        self._drain = Drain()
        self.http_port = 0
        """Where health and metrics are served, once `run` has begun."""

    def signal(self, reason: str) -> None:
        """Somebody wants the process to end: the first time it drains, the second time it stops at once."""
        if self._drain.asked():
            self._drain.hurry()
        else:
            self._begin_drain(reason)

    async def run(self) -> int:
        """Serve until drained; the process's exit code: 0, 2 where the engine or its device is lost, 1 for a fault.

        Raises:
            WorkerError: ModelLoadFailed, InsufficientVram or ConfigInvalid: it never began to serve.
            Disconnected: the server could not be reached at the start.
        """
        http = self._pages()
        await http.open(self._http.host, self._http.port)
        self.http_port = http.port
        speaking = [asyncio.create_task(self._always(w)) for w in (self._reporter.publish, self._reporter.heartbeat)]
        code = 1
        try:
            code = await self._live()
        except CudaError as error:
            self._fail(error)
            code = _LOST_DEVICE
        except WorkerError as error:
            self._fail(error)
            raise
        except Disconnected:
            raise
        except Exception as error:
            self._log.error("worker_fault", frames=frames_of(error))
            self._fail(Internal(f"{type(error).__name__} in the service"))
        finally:
            self._log.info("worker_stopped", exit_code=code)
            self._reporter.tell(Stopped(reason=self._drain.reason or self._health.state, exit_code=code))
            await self._reporter.flush(_LAST_WORDS_S)
            for task in speaking:
                task.cancel()
            self._engine.stop()
            await http.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._transport.close()
        return code

    def join_engine(self, timeout_s: float) -> bool:
        """Wait for the engine's thread; whether it has ended. After `run`, off the loop."""
        return self._engine.join(timeout_s)

    def _pages(self) -> StatusServer:
        return StatusServer(
            {
                "/livez": lambda: json_answer(self._health.alive, self._health.report()),
                "/readyz": lambda: json_answer(self._health.ready, self._health.report()),
                "/metrics": lambda: (HTTPStatus.OK, TEXT, self._meters.exposition()),
            }
        )

    def _always(self, work: Callable[[], Coroutine[Any, Any, None]]) -> Coroutine[Any, Any, NoReturn]:
        return for_ever(work, self._lease.scan_s, self._log)

    async def _live(self) -> int:
        served = await self._start()
        if served is None:
            return 0
        bench = Workbench(
            self._transport,
            self._engine,
            served,
            self._section,
            self._lease.renew_s,
            self._meters,
            self._log,
            lambda: self._health.memory,
            self._reporter.quiet,
        )
        return await first_of(
            self._take_jobs(bench),
            self._watch_engine(),
            self._end_in_time(),
            self._always(self._hear_commands),
            self._always(lambda: self._reporter.watch_memory(self._engine, served)),
            self._always(lambda: self._reporter.check_residency(self._engine, served)),
        )

    async def _start(self) -> LoadedModel | None:
        """Load the model and reach the server, side by side; None where a drain comes first."""
        began, loop = time.monotonic(), asyncio.get_running_loop()
        self._log.info("worker_starting", version=__version__, http_port=self.http_port)
        assigned = self._assignment
        self._reporter.announce(assigned.model, assigned.backend, assigned.name, assigned.queue, self.http_port)

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(self._reporter.load_progress, done, total)

        loading = asyncio.ensure_future(self._engine.call(lambda: self._load(progress)))
        needed = asyncio.gather(loading, self._reach())
        needed.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, where nobody waits for it
        draining = asyncio.ensure_future(self._drain.wait())
        try:
            await asyncio.wait((needed, draining), return_when=asyncio.FIRST_COMPLETED)
            if not needed.done():
                return None
            served, _ = await needed
        finally:
            draining.cancel()
            needed.cancel()
        await self._engine.own(served.engine)
        self._ready(served, time.monotonic() - began)
        return served

    async def _reach(self) -> None:
        """Open the transport. Raises Disconnected if the server stays away."""
        patience_s, opening = self._assignment.patience_s, asyncio.ensure_future(self._transport.open())
        try:
            done, _ = await asyncio.wait([opening], timeout=min(_LAST_WORDS_S, patience_s))
            if not done:
                self._log.warning("server_silent", patience_s=patience_s)
                done, _ = await asyncio.wait([opening], timeout=patience_s)
            if not done:
                raise Disconnected(f"no answer for {patience_s:g} s")
            opening.result()
        finally:
            opening.cancel()

    def _ready(self, served: LoadedModel, load_s: float) -> None:
        device = served.device.device
        self._log = self._log.bind(model=served.name, gpu=device)
        self._meters.model_load.set(load_s)
        self._reporter.introduce(served, load_s)
        self._reporter.memory_moved()
        self._health.enter("ready")
        self._log.info("worker_ready", load_s=round(load_s, 3), context=served.engine.context)

    async def _take_jobs(self, bench: Workbench) -> int:
        """One job after another, until the drain. Raises CudaError where the device is lost over one."""
        while not self._drain.asked():
            claim = await self._claim()
            if claim is None:
                continue
            if self._drain.asked():
                await self._transport.release(claim)
                break
            if await self._carry(bench, claim) == "stalled":  # or it would claim the job itself that it has left
                return _LOST_DEVICE
        return 0

    async def _claim(self) -> Claim | None:
        try:
            return await self._transport.claim()
        except Exception as error:  # an entry that nobody can read must not end the worker: others may still work
            self._log.error("claim_fault", frames=frames_of(error))
            await asyncio.sleep(self._lease.scan_s)
            return None

    async def _carry(self, bench: Workbench, claim: Claim) -> str:
        attempt = self._attempt = Attempt(bench, claim)
        self._reporter.quiet.begin(self._reporter.busy)
        try:
            outcome = await attempt.run()
        except CudaError:
            raise
        except Exception as error:  # the server refused a command, or a fault of ours: the job's lease runs out
            self._log.error("attempt_fault", job_id=attempt.job_id, frames=frames_of(error))
            outcome = "fault"
        finally:
            self._attempt = None
            self._reporter.quiet.end()
        self._meters.requests.labels(outcome).inc()
        self._health.ended(outcome)
        self._reporter.memory_moved()
        return outcome

    async def _watch_engine(self) -> int:
        """Return when the engine hangs and its job has been left to another worker."""
        await stalled(self._engine, self._section.stall_s)
        self._fail(Internal(f"the engine made no step for {self._section.stall_s:g} s"))
        self._interrupt(Stop.STALLED)
        await asyncio.sleep(3 * _LAST_WORDS_S)
        return _LOST_DEVICE

    def _interrupt(self, why: Stop) -> None:
        if self._attempt is not None:
            self._attempt.bounds.interrupt(why)

    def _begin_drain(self, reason: str) -> None:
        if self._drain.asked():
            return
        running = self._attempt is not None
        self._drain.begin(reason, self._section.grace_s if running else 0.0)
        self._health.enter("draining")
        self._log.info("worker_draining", reason=reason, grace_s=self._drain.grace_s)
        self._reporter.tell(Draining(reason=reason, grace_s=self._drain.grace_s, running=int(running)))

    async def _end_in_time(self) -> int:
        """Return when the worker has been asked to end and its job had the time to."""
        await self._drain.run_out(lambda: self._interrupt(Stop.DRAIN))
        return 0

    async def _hear_commands(self) -> None:
        """Obey what operators send."""
        async for command in self._transport.registration.commands():
            if command.do == "cancel" and self._attempt is not None and self._attempt.job_id == command.target:
                self._interrupt(Stop.CANCEL)
            elif command.do == "drain" and command.target in (self._transport.worker_id, self._assignment.name):
                self._begin_drain("command")

    def _fail(self, error: WorkerError) -> None:
        """The worker will end by this error: its own stream and the log hear of it."""
        self._health.enter("failed")
        self._reporter.tell(ErrorEvent.of(error))
        self._log.error("worker_failed", code=error.code, reason=error.message)
