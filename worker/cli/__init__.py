"""The command line, one module per group of commands. `main` is the console script.

Exit codes are those of `_HELP`; 1 is also any other failure, 2 also a CUDA error. Before its first
statement, `main` imports nothing but the standard library's smallest modules: a container may be
stopped at any time.
"""

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

from worker import __version__

if TYPE_CHECKING:
    import typer

_HELP = """Run language models from GGUF files.

Download a small model and chat with it:

    worker pull smollm2

    worker generate smollm2 "Why is the sky blue?" --chat

Serve it from a queue on a Redis server, and submit a job:

    worker run --model smollm2 --redis-url redis://127.0.0.1:6379/0

    worker submit --chat --wait "Why is the sky blue?"

MODEL is a path to a .gguf file or the name of a pulled model (`worker pull`). Exit codes: 0 success, 1 the model
can't be served, or the job failed or is not known, 2 wrong usage, 3 invalid request, 4 invalid settings, 5 the
Redis server is unreachable or refuses, 130 interrupted.
"""

_SWITCH_S = 0.0002
"""GIL switch interval. The engine's thread waits as long for the event loop each time a device call
returns, several times in a step of 1 ms, and the event loop for the engine's thread."""

_MODULES = {
    "generate": "generate",
    "models": "tokenize inspect pull",
    "demo": "demo",
    "bench": "bench",
    "serve_model": "serve",
    "serve": "run",
    "gateway": "gateway",
    "jobs": "submit tail cancel",
    "operate": "jobs workers drain health dead",
    "top": "top",
}
"""Module → its commands, in the order of the help."""


def command_line(only: str | None = None) -> "typer.Typer":
    """Return the command line; if `only` names a command, that one without the others' imports."""
    import typer  # noqa: PLC0415  # see `main`

    def print_version(wanted: bool) -> None:
        if wanted:
            print(f"worker {__version__}")
            raise typer.Exit

    version = typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)

    def global_options(version: Annotated[bool, version] = False) -> None: ...

    app = typer.Typer(help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.callback()(global_options)
    modules = {name: module for module, names in _MODULES.items() for name in names.split()}
    for name in [only] if only in modules else modules:
        command = getattr(import_module(f"worker.cli.{modules[name]}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main() -> None:
    """Run the command line; report an expected failure as one sentence and an exit code."""
    if sys.argv[1:2] in (
        ["run"],
        ["gateway"],
    ):  # as a container's first process it would ignore SIGTERM without a handler
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))  # nothing is connected; `serve` drains from its start on
    from worker.errors import WorkerError  # noqa: PLC0415  # after the handlers

    sys.setswitchinterval(_SWITCH_S)
    try:
        command_line(next(iter(sys.argv[1:]), None))(prog_name="worker")
    except WorkerError as error:
        from worker.cli.console import plain  # noqa: PLC0415  # as above

        print(f"worker: {error.code}: {plain(error.message)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout closed it: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ConnectionError as error:  # Disconnected, which is not imported here
        code = getattr(error, "code", "REDIS_UNREACHABLE")
        remedy = (
            "start the server, or name another with --redis-url" if code == "REDIS_UNREACHABLE" else "try again later"
        )
        print(f"worker: {code}: {str(error).rstrip('.')}; {remedy}", file=sys.stderr)
        sys.exit(5)
