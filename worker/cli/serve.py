"""`worker run`: settings in, a serving worker out. Nothing of the service is imported before it is asked for."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.console import progress_bar
from worker.cli.remote import connect
from worker.config import Settings, load_settings
from worker.errors import ConfigInvalid
from worker.gpu.wake import wake_device

if TYPE_CHECKING:
    from worker.jobs.redis_streams import RedisStreams
    from worker.runtime import LoadedModel, ModelLoader, Progress

_ECHO_CONTEXT = 8192
_ECHO_CHUNK = 64
_JOIN_S = 2.0
_ENDING = (signal.SIGTERM, signal.SIGINT)

_SERVER = "Server and queue"
_ENGINE = "Model and engine"


def run(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file such as configs/default.toml.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A .gguf file, or a name that `worker pull` knows.", rich_help_panel=_ENGINE)
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="cpu or gpu; by default a GPU if there is one.", rich_help_panel=_ENGINE)
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Longest prompt and answer together, in tokens.", rich_help_panel=_ENGINE)
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Whether prompts that begin alike share what was computed; on by default.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    echo: Annotated[
        bool,
        typer.Option("--echo", help="Serve no model: every answer repeats its prompt.", rich_help_panel=_ENGINE),
    ] = False,
    echo_step_ms: Annotated[
        float, typer.Option(min=0, help="With --echo: how long a token takes.", rich_help_panel=_ENGINE)
    ] = 0.0,
    redis_url: Annotated[
        str | None, typer.Option(help="Such as redis://127.0.0.1:6379/0.", rich_help_panel=_SERVER)
    ] = None,
    queue: Annotated[str | None, typer.Option(help="The queue to take jobs from.", rich_help_panel=_SERVER)] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Begins the worker's id, in place of the host's name.", rich_help_panel=_SERVER),
    ] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds that SIGTERM leaves the running job.", rich_help_panel=_SERVER)
    ] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Of /livez, /readyz and /metrics; 0 takes any.", rich_help_panel=_SERVER)
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="json, console, or by default auto.")] = None,
) -> None:
    """Serve one model: take jobs from a queue, publish their tokens, until told to stop.

    Flags win over the environment (WORKER_REDIS__URL=…), that over the --config file, that over the defaults, which
    configs/default.toml lists with their reasons.

        worker run --model smollm2 --redis-url redis://127.0.0.1:6379/0

    SIGTERM or Ctrl-C: takes no more jobs, finishes the running one within the grace period or hands it back, exits 0.
    A second one stops at once. Exit codes: 1 the model can't be served, 2 the device is lost or hangs, 4 the settings
    are wrong, 5 the server can't be reached.
    """
    flags = {
        "model.path": model,
        "model.context": context,
        "engine.backend": backend,
        "engine.prefix_cache": prefix_cache,
        "redis.url": redis_url,
        "redis.queue": queue,
        "service.name": name,
        "service.grace_s": grace,
        "http.port": http_port,
        "log.level": log_level,
        "log.format": log_format,
    }
    settings = load_settings(config, flags)
    if not echo and not settings.model.path:
        raise ConfigInvalid("model.path: no model is named; give --model FILE or NAME, or --echo to try without one")
    if not echo and settings.engine.backend != "cpu":
        wake_device()
    gc.disable()  # until it is loaded: what is imported and read stays, and looking through it for cycles takes time
    code, ended = asyncio.run(_serve(settings, _loader(settings, echo, echo_step_ms / 1000), echo))
    sys.stderr.flush()
    if not ended:  # the engine hangs in its device, and so would an orderly exit
        os._exit(code)
    raise typer.Exit(code)


async def _serve(settings: Settings, load: ModelLoader, echo: bool) -> tuple[int, bool]:
    """Serve to the end: the exit code, and whether the engine's thread has ended too."""
    from worker.jobs.lease import Policy  # noqa: PLC0415  # other commands don't wait for these imports
    from worker.jobs.streams import Disconnected  # noqa: PLC0415
    from worker.jobs.transport import Transport  # noqa: PLC0415
    from worker.service import Assignment, Service  # noqa: PLC0415
    from worker.telemetry import open_log  # noqa: PLC0415

    name = settings.service.name or socket.gethostname()
    worker_id = f"{name}-{os.getpid()}-{secrets.token_hex(3)}"
    log, streams = open_log(settings.log, worker_id), connect(settings.redis.url)
    lease = settings.lease
    policy = Policy(
        lease_s=lease.lease_s,
        scan_s=lease.scan_s,
        retention_s=lease.retention_s,
        unsettled_s=lease.unsettled_s,
        max_attempts=lease.max_attempts,
        max_deliveries=lease.max_deliveries,
    )
    asked_for = "echo" if echo else settings.model.path
    service = Service(
        Assignment(asked_for, settings.engine.backend, settings.redis.queue, name, settings.redis.patience_s),
        settings.service,
        lease,
        settings.http,
        Transport(streams, worker_id, settings.redis.queue, policy),
        load,
        log,
    )
    loop = asyncio.get_running_loop()
    for number in _ENDING:
        loop.add_signal_handler(number, service.signal, number.name)
    loop.set_exception_handler(lambda _, context: log.error("loop_fault", what=context["message"]))
    try:
        code = await service.run()
    except Disconnected as error:
        raise Disconnected(f"{error}: {await _reason(streams)}") from None
    finally:
        for number in _ENDING:  # it ends already: one more must not replace the exit code, however late it comes
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
    return code, service.join_engine(_JOIN_S)


async def _reason(streams: RedisStreams) -> str:
    """Why a server can't be reached: refused, unknown, a wrong password."""
    from worker.jobs.streams import Disconnected  # noqa: PLC0415  # as above

    try:
        await streams.time_ms()
    except Disconnected as error:
        return str(error)
    finally:
        await streams.close()
    return "it answers only now"


def _loader(settings: Settings, echo: bool, step_s: float) -> ModelLoader:
    def load(progress: Progress) -> LoadedModel:
        try:
            return _load_echo(settings, step_s, progress) if echo else _load_model(settings, progress)
        finally:
            gc.freeze()  # nor later, when a job waits: what a load made stays, and leaves no garbage
            gc.enable()

    return load


def _load_echo(settings: Settings, step_s: float, progress: Progress) -> LoadedModel:
    from worker.echo_model import load_echo  # noqa: PLC0415  # as above

    context = settings.model.context or _ECHO_CONTEXT
    chunk = settings.engine.prefill_chunk or _ECHO_CHUNK
    return load_echo(context, chunk, step_s, progress, prefix_cache=settings.engine.prefix_cache)


def _load_model(settings: Settings, progress: Progress) -> LoadedModel:
    from worker import hub  # noqa: PLC0415
    from worker.runtime import load  # noqa: PLC0415

    path = hub.resolve(settings.model.path, settings.hub.cache)
    with progress_bar("loading") as bar:

        def both(done: int, total: int) -> None:
            bar(done, total)
            progress(done, total)

        return load(path, settings.model, settings.engine, both)
