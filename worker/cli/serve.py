"""`worker run`: read the settings, load the model in the background, serve jobs until drained.

`serving.py` is imported in `run`, so that the GPU initializes during its imports.
"""

import asyncio
import gc
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from worker.config import load_settings
from worker.errors import ConfigInvalid
from worker.gpu import create_context_in_background

_engine = partial(typer.Option, rich_help_panel="Model and engine")
_server = partial(typer.Option, rich_help_panel="Server and queue")


def _queues(names: list[str]) -> dict[str, object]:
    """The settings of `--queue`: one is a plain name, several have the form of `redis.queues`."""
    if len(names) == 1:
        return {"redis.queue": names[0], "redis.queues": []}
    return {"redis.queues": names or None}


def run(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file such as configs/default.toml.")] = None,
    model: Annotated[str | None, _engine(help="A .gguf file, or a name that `worker pull` knows.")] = None,
    served_name: Annotated[
        str | None, _engine(metavar="NAME", help="Name that jobs and clients call the model; by default the file's.")
    ] = None,
    backend: Annotated[str | None, _engine(help="cpu or gpu; by default the GPU if there is one.")] = None,
    context: Annotated[int | None, _engine(help="Maximum tokens of prompt and answer together.")] = None,
    max_running: Annotated[
        int | None, _engine(min=1, max=256, help="Jobs that run at once; 1 by default. No answer depends on it.")
    ] = None,
    prefix_cache: Annotated[
        bool | None, _engine(help="Share the KV cache of common prompt prefixes; on by default.")
    ] = None,
    echo: Annotated[bool, _engine("--echo", help="Serve no model: each answer repeats its prompt.")] = False,
    echo_step_ms: Annotated[float, _engine(min=0, help="With --echo: milliseconds per token.")] = 0.0,
    redis_url: Annotated[str | None, _server(help="For example redis://127.0.0.1:6379/0.")] = None,
    queue: Annotated[
        list[str] | None,
        _server(help="Name of the queue; repeat it for several, most urgent first, or all with weights: a:3."),
    ] = None,
    name: Annotated[str | None, _server(help="First part of the worker's id; by default the host name.")] = None,
    grace: Annotated[float | None, _server(help="Seconds that the running job has after SIGTERM.")] = None,
    http_port: Annotated[int | None, _server(help="Port of /livez, /readyz, /metrics; 0 picks a free one.")] = None,
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
        "model.name": served_name,
        "model.context": context,
        "engine.backend": backend,
        "engine.max_running": max_running,
        "engine.prefix_cache": prefix_cache,
        "redis.url": redis_url,
        **_queues(queue or []),
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
    from worker.cli.serving import serve  # noqa: PLC0415  # after create_context_in_background

    code, joined = asyncio.run(serve(settings, echo, echo_step_ms / 1000))
    sys.stderr.flush()
    if not joined:  # the engine thread hangs in a device call; interpreter shutdown would wait for it
        os._exit(code)
    raise typer.Exit(code)
