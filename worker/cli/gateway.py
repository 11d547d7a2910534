"""`worker gateway`: serve the HTTP APIs over the queue."""

import asyncio
import contextlib
import os
import socket
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from worker.cli.remote import ConfigOption, QueueOption, UrlOption, connect
from worker.config import Settings, load_settings
from worker.errors import ConfigInvalid
from worker.jobs.client import Client
from worker.jobs.streams import Contact
from worker.telemetry import open_log
from worker.tracing import open_tracing

_http = partial(typer.Option, rich_help_panel="HTTP")
_PACKAGES = ("starlette", "uvicorn", "httptools", "uvloop", "python_multipart")


def gateway(
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
    host: Annotated[str | None, _http(help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, _http(help="Port to listen on; 8000 by default, 0 picks a free one.")] = None,
    api_keys: Annotated[Path | None, _http(metavar="FILE", help="TOML file of API keys; without it all may.")] = None,
    grace: Annotated[float | None, _http(help="Seconds that open streams have after SIGTERM.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="json, console or auto (default).")] = None,
) -> None:
    """Serve HTTP APIs over the queue, and a page for chats.

    OpenAI's: chat and text completions, responses, files, batches, models. Anthropic's: messages.

    Any number of gateways may run; they need no GPU and no model file.

        worker gateway --redis-url redis://127.0.0.1:6379/0 --port 8000

    SIGTERM or Ctrl-C drains: new requests get status 503, open streams finish within the grace
    period. A second signal stops it immediately.
    """
    flags = {
        "redis.url": redis_url,
        "redis.queue": queue,
        "gateway.host": host,
        "gateway.port": port,
        "gateway.api_keys": None if api_keys is None else str(api_keys),
        "gateway.grace_s": grace,
        "log.level": log_level,
        "log.format": log_format,
    }
    settings = load_settings(config, flags)
    require_packages()
    import uvloop  # noqa: PLC0415  # of the extra `gateway`

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


def require_packages() -> None:
    """Raise ConfigInvalid unless the packages of the extra `gateway` are installed."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ConfigInvalid(f"the gateway needs {', '.join(missing)}; pip install 'worker-orcd[gateway]'")


async def _serve(settings: Settings) -> None:
    from worker.gateway.context import GatewayContext  # noqa: PLC0415  # of the extra `gateway`
    from worker.gateway.keys import ApiKeys  # noqa: PLC0415
    from worker.gateway.server import listen, serve  # noqa: PLC0415

    name = f"gateway-{socket.gethostname()}"
    log = open_log(settings.log, name)
    tracing = open_tracing(settings.tracing, "gateway", f"{name}-{os.getpid()}", log)
    contact = Contact(
        lambda reason: log.warning("redis_lost", reason=reason),
        lambda seconds: log.warning("redis_back", lost_s=round(seconds, 3)),
        from_start=False,
    )
    redis, section = settings.redis, settings.gateway
    client = Client(connect(redis, contact), redis.queue, redis.queue_bound)
    context = GatewayContext(
        section, client, ApiKeys.load(section.api_keys), log, settings.lease.lease_s, tracing=tracing
    )
    with contextlib.closing(listen(section)) as listener, contextlib.ExitStack() as stack:
        if tracing is not None:
            stack.callback(tracing.close)
        await client.workers()  # an unreachable server ends the command with exit code 5
        await serve(context, listener)
