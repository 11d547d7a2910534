"""The service inside `worker run`: signals, connection to the server, loading of the model.

`worker/service/service.py` has the service itself.
"""

import asyncio
import gc
import os
import secrets
import signal
import socket

from worker import hub, runtime
from worker.cli.console import progress_bar
from worker.cli.remote import connect
from worker.config import Settings
from worker.jobs.streams import Contact, Disconnected
from worker.jobs.transport import Transport
from worker.queue_order import QueueOrder
from worker.runtime import LoadedModel, Progress
from worker.service import Assignment, Service
from worker.telemetry import open_log
from worker.tracing import open_tracing

_ECHO_CONTEXT = 8192
_ECHO_CHUNK = 64
_JOIN_TIMEOUT_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(settings: Settings, echo: bool, echo_step_s: float) -> tuple[int, bool]:
    """Serve until drained; return the exit code, and whether the engine thread has ended."""

    def load(progress: Progress) -> LoadedModel:
        try:
            return _load_echo(settings, echo_step_s, progress) if echo else _load_model(settings, progress)
        finally:
            gc.freeze()  # what the load allocated stays: leave it out of later collections
            gc.enable()

    name, redis = settings.service.name or socket.gethostname(), settings.redis
    worker_id = f"{name}-{os.getpid()}-{secrets.token_hex(3)}"
    log = open_log(settings.log, worker_id)
    contact = Contact(
        lambda reason: log.warning("redis_lost", reason=reason),
        lambda seconds: log.warning("redis_back", lost_s=round(seconds, 3)),
    )
    streams = connect(redis, contact)
    model = "echo" if echo else settings.model.path
    queues = ",".join(QueueOrder(redis.served).names)
    assignment = Assignment(model, settings.engine.backend, queues, name, redis.patience_s)
    transport = Transport(streams, worker_id, redis.served, settings.lease)
    tracing = open_tracing(settings.tracing, "worker", worker_id, log)
    service = Service(assignment, settings.service, settings.lease, settings.http, transport, load, log, tracing)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, service.signal, number.name)
    loop.set_exception_handler(lambda _, context: log.error("loop_fault", what=context["message"]))
    try:
        code = await service.run()
    except Disconnected as error:
        cause = contact.last_error or error
        raise Disconnected(f"{cause}; gave up after {redis.patience_s:g} s", cause.reply) from None
    finally:
        for number in _SIGNALS:  # a later signal must not replace the exit code
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        if tracing is not None:
            tracing.close()
    return code, service.join_engine(_JOIN_TIMEOUT_S)


def _load_echo(settings: Settings, step_s: float, progress: Progress) -> LoadedModel:
    from worker.echo import load_echo  # noqa: PLC0415  # only --echo needs it

    context = settings.model.context or _ECHO_CONTEXT
    chunk = settings.engine.prefill_chunk or _ECHO_CHUNK
    return load_echo(
        context,
        chunk,
        step_s,
        progress,
        prefix_cache=settings.engine.prefix_cache,
        max_running=settings.engine.max_running,
    )


def _load_model(settings: Settings, progress: Progress) -> LoadedModel:
    path = hub.resolve(settings.model.path, settings.hub.cache)
    with progress_bar("loading") as bar:

        def report(done: int, total: int) -> None:
            bar(done, total)
            progress(done, total)

        return runtime.load(path, settings.model, settings.engine, report)
