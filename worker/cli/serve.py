"""`worker run`: read the settings, load the model in the background, serve jobs until drained.

The service is imported in `_serve`, so that the GPU initializes during these imports.
"""

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
from worker.config import Settings, load_settings
from worker.errors import ConfigInvalid
from worker.gpu import create_context_in_background

if TYPE_CHECKING:  # imported after create_context_in_background, see above
    from worker.jobs.streams import Streams
    from worker.runtime import LoadedModel, ModelLoader, Progress

_ECHO_CONTEXT = 8192
_ECHO_CHUNK = 64
_JOIN_TIMEOUT_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_SERVER = "Server and queue"
_ENGINE = "Model and engine"


def run(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file such as configs/default.toml.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A .gguf file, or a name that `worker pull` knows.", rich_help_panel=_ENGINE)
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="cpu or gpu; by default the GPU if there is one.", rich_help_panel=_ENGINE)
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Maximum tokens of prompt and answer together.", rich_help_panel=_ENGINE)
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Share the KV cache of common prompt prefixes; on by default.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    echo: Annotated[
        bool,
        typer.Option("--echo", help="Serve no model: each answer repeats its prompt.", rich_help_panel=_ENGINE),
    ] = False,
    echo_step_ms: Annotated[
        float, typer.Option(min=0, help="With --echo: milliseconds per token.", rich_help_panel=_ENGINE)
    ] = 0.0,
    redis_url: Annotated[
        str | None, typer.Option(help="For example redis://127.0.0.1:6379/0.", rich_help_panel=_SERVER)
    ] = None,
    queue: Annotated[str | None, typer.Option(help="Name of the queue.", rich_help_panel=_SERVER)] = None,
    name: Annotated[
        str | None,
        typer.Option(help="First part of the worker's id; by default the host name.", rich_help_panel=_SERVER),
    ] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds that the running job has after SIGTERM.", rich_help_panel=_SERVER)
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option(help="Port of /livez, /readyz and /metrics; 0 picks a free one.", rich_help_panel=_SERVER),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="json, console or auto (default).")] = None,
) -> None:
    """Serve one model: take jobs from a queue and publish their tokens.

    Flags override the environment (WORKER_REDIS__URL=…), which overrides the --config file, which
    overrides the defaults; configs/default.toml explains each setting.

        worker run --model smollm2 --redis-url redis://127.0.0.1:6379/0

    SIGTERM or Ctrl-C drains: the worker takes no more jobs, finishes the running one within the
    grace period or returns it to the queue, and exits with 0. A second signal stops it immediately.
    Exit codes: 1 the model cannot be served, 2 the device is lost or hangs, 4 invalid settings, 5
    the server cannot be reached.
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
        raise ConfigInvalid("model.path: no model given; pass --model FILE or NAME, or --echo to try without one")
    if not echo and settings.engine.backend != "cpu":
        create_context_in_background()
    gc.disable()  # until the model is loaded: a collection would traverse imports and metadata, which stay
    code, joined = asyncio.run(_serve(settings, _loader(settings, echo, echo_step_ms / 1000), echo))
    sys.stderr.flush()
    if not joined:  # the engine thread hangs in a device call; interpreter shutdown would wait for it
        os._exit(code)
    raise typer.Exit(code)


async def _serve(settings: Settings, load: ModelLoader, echo: bool) -> tuple[int, bool]:
    """Serve until drained; return the exit code, and whether the engine thread has ended."""
    from worker.cli.remote import connect  # noqa: PLC0415  # see the module's docstring
    from worker.jobs.streams import Disconnected  # noqa: PLC0415
    from worker.jobs.transport import Transport  # noqa: PLC0415
    from worker.service import Assignment, Service  # noqa: PLC0415
    from worker.telemetry import open_log  # noqa: PLC0415

    name = settings.service.name or socket.gethostname()
    worker_id = f"{name}-{os.getpid()}-{secrets.token_hex(3)}"
    log, streams = open_log(settings.log, worker_id), connect(settings.redis.url)
    model = "echo" if echo else settings.model.path
    service = Service(
        Assignment(model, settings.engine.backend, settings.redis.queue, name, settings.redis.patience_s),
        settings.service,
        settings.lease,
        settings.http,
        Transport(streams, worker_id, settings.redis.queue, settings.lease),
        load,
        log,
    )
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, service.signal, number.name)
    loop.set_exception_handler(lambda _, context: log.error("loop_fault", what=context["message"]))
    try:
        code = await service.run()
    except Disconnected as error:
        raise Disconnected(f"{error}: {await _disconnect_reason(streams)}") from None
    finally:
        for number in _SIGNALS:  # a later signal must not replace the exit code
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
    return code, service.join_engine(_JOIN_TIMEOUT_S)


async def _disconnect_reason(streams: Streams) -> str:
    """Why the server cannot be reached: connection refused, unknown host, wrong password."""
    from worker.jobs.streams import Disconnected  # noqa: PLC0415

    try:
        await streams.time_ms()
    except Disconnected as error:
        return str(error)
    finally:
        await streams.close()
    return "it replies again"


def _loader(settings: Settings, echo: bool, step_s: float) -> ModelLoader:
    def load(progress: Progress) -> LoadedModel:
        try:
            return _load_echo(settings, step_s, progress) if echo else _load_model(settings, progress)
        finally:
            gc.freeze()  # what the load allocated stays: leave it out of later collections
            gc.enable()

    return load


def _load_echo(settings: Settings, step_s: float, progress: Progress) -> LoadedModel:
    from worker.echo import load_echo  # noqa: PLC0415

    context = settings.model.context or _ECHO_CONTEXT
    chunk = settings.engine.prefill_chunk or _ECHO_CHUNK
    return load_echo(context, chunk, step_s, progress, prefix_cache=settings.engine.prefix_cache)


def _load_model(settings: Settings, progress: Progress) -> LoadedModel:
    from worker import hub  # noqa: PLC0415
    from worker.runtime import load  # noqa: PLC0415

    path = hub.resolve(settings.model.path, settings.hub.cache)
    with progress_bar("loading") as bar:

        def report(done: int, total: int) -> None:
            bar(done, total)
            progress(done, total)

        return load(path, settings.model, settings.engine, report)
