"""The command line, a file a family of commands. `main` is the console script.

Exit codes: 0 done, 1 the model can't be served or another failure, 2 wrong usage or a lost device, 3 the request was
refused, 4 the settings are wrong, 5 the server can't be reached, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import typer

from worker.cli import bench, demo, generate, jobs, models, operate, serve
from worker.errors import WorkerError

_HELP = """Run language models from GGUF files.

Get a small real model and chat with it:

    worker pull smollm2

    worker generate smollm2 "Why is the sky blue?" --chat

Serve it to a queue of a Redis server, and ask it something from anywhere:

    worker run --model smollm2 --redis-url redis://127.0.0.1:6379/0

    worker submit --chat --wait "Why is the sky blue?"

MODEL is always a path to a .gguf file or a name that `worker pull` knows. Exit codes: 0 done, 1 the model can't be
served, 2 wrong usage, 3 the request was refused, 4 the settings are wrong, 5 the server can't be reached, 130
interrupted.
"""

_UNREACHABLE = 5

app = typer.Typer(help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
app.command("generate")(generate.generate)
app.command("tokenize")(models.tokenize)
app.command("inspect")(models.inspect)
app.command("pull")(models.pull)
app.command("demo")(demo.demo)
app.command("bench")(bench.bench)
app.command("run")(serve.run)
app.command("submit")(jobs.submit)
app.command("tail")(jobs.tail)
app.command("cancel")(jobs.cancel)
app.command("jobs")(operate.jobs)
app.command("workers")(operate.workers)
app.command("drain")(operate.drain)
app.command("health")(operate.health)
app.add_typer(operate.dead, name="dead")


def main() -> None:
    """Run the command line; every expected failure is one sentence on stderr and an exit code."""
    try:
        app(prog_name="worker")
    except WorkerError as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left: not an error, and nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ConnectionError as error:
        print(
            f"worker: REDIS_UNREACHABLE: {str(error).rstrip('.')}; start the server, or name another with --redis-url",
            file=sys.stderr,
        )
        sys.exit(_UNREACHABLE)


def _report(error: WorkerError) -> int:
    print(f"worker: {error.code}: {error.message}", file=sys.stderr)
    return error.exit_code
