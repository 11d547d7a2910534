"""An operator's everyday: `worker jobs`, `workers`, `drain`, `health` and `dead`."""

from __future__ import annotations

import http.client
import json as jsonlib
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from worker.cli.console import JsonOption, print_json
from worker.cli.remote import ConfigOption, QueueOption, UrlOption, client, redis_section
from worker.config import load_settings
from worker.errors import InvalidRequest, WorkerError
from worker.jobs.payload import read_map
from worker.jobs.protocol import MAX_PAYLOAD_BYTES

if TYPE_CHECKING:
    from worker.jobs.client import DeadLetter
    from worker.jobs.sync_client import SyncClient

dead = typer.Typer(help="The dead letters: jobs that were given up.", no_args_is_help=True)

_HEALTH_S = 3.0


class NotFound(WorkerError):
    """There is no such worker or dead letter."""

    code = "NOT_FOUND"


class Unhealthy(WorkerError):
    """The worker did not answer, or answered that it is not well."""

    code = "UNHEALTHY"


def worker_id(connected: SyncClient, name: str) -> str:
    """The id of the living worker called `name`, or `name` itself, which may be the id of one that has ended."""
    found = [each for each, status in connected.workers().items() if name in (each, status.get("name"))]
    if len(found) > 1:
        raise NotFound(f"{name} is the name of {len(found)} workers; say which: {', '.join(sorted(found))}")
    return found[0] if found else name


def jobs(
    count: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    json: JsonOption = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """List the jobs of the queue, oldest first: who holds which, and since when it waits."""
    with client(redis_section(config, redis_url, queue)) as connected:
        entries = connected.queue(count)
    now_ms = time.time() * 1000
    rows = [
        {
            "job_id": entry.job_id,
            "state": "running" if entry.worker else "waiting",
            "worker": entry.worker,
            "deliveries": entry.deliveries,
            "age_s": round(max(0.0, now_ms - int(entry.entry_id.partition("-")[0])) / 1000, 1),
            "entry": entry.entry_id,
        }
        for entry in entries
    ]
    _print_rows(rows, json, "the queue is empty")


def workers(
    json: JsonOption = False, config: ConfigOption = None, redis_url: UrlOption = None, queue: QueueOption = None
) -> None:
    """List the living workers and how they are."""
    with client(redis_section(config, redis_url, queue)) as connected:
        found = connected.workers()
    shown = ("state", "model", "device", "queue", "jobs", "degraded", "host", "pid", "http_port")
    rows: list[dict[str, Any]] = [
        {"worker": name, **(status if json else {key: status.get(key) for key in shown})}
        for name, status in sorted(found.items())
    ]
    _print_rows(rows, json, "no worker is alive")


def drain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A worker's id, or its --name: then all of that name.")],
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """Ask a worker to take no more jobs, finish the running one within its grace period, and end."""
    with client(redis_section(config, redis_url, queue)) as connected:
        found = [each for each, status in connected.workers().items() if name in (each, status.get("name"))]
        if not found:
            raise NotFound(f"no living worker is called {name}; `worker workers` lists them")
        connected.drain(name)
    for each in found:
        print(each)


def health(
    url: Annotated[str | None, typer.Option(help="HOST:PORT; by default that of the settings.")] = None,
    ready: Annotated[bool, typer.Option("--ready", help="Ask whether it takes jobs, not only if it lives.")] = False,
    config: ConfigOption = None,
) -> None:
    """Ask a worker's HTTP port how it is: prints the answer, exit code 0 if it is well and 1 if not.

    For a container's health check; --ready is for a load balancer's.
    """
    settings = load_settings(config).http
    host, _, port = (url or f"{settings.host}:{settings.port}").removeprefix("http://").rstrip("/").rpartition(":")
    if not port.isdigit():
        raise typer.BadParameter(f"{url!r} is no HOST:PORT", param_hint="--url")
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    path = "/readyz" if ready else "/livez"
    connection = http.client.HTTPConnection(host, int(port), timeout=_HEALTH_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise Unhealthy(f"http://{host}:{port}{path} does not answer ({error}); is `worker run` up?") from None
    finally:
        connection.close()
    print(body)
    raise typer.Exit(0 if response.status == http.client.OK else 1)


@dead.command("ls")
def dead_ls(
    json: JsonOption = False, config: ConfigOption = None, redis_url: UrlOption = None, queue: QueueOption = None
) -> None:
    """List the dead letters, oldest first."""
    with client(redis_section(config, redis_url, queue)) as connected:
        letters = connected.dead_letters()
    _print_rows([_facts(letter) for letter in letters], json, "no dead letters")


@dead.command("show")
def dead_show(
    letter: Annotated[str, typer.Argument(metavar="ID", help="As `worker dead ls` gives it.")],
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """Print one dead letter as JSON, with the job as it was submitted."""
    with client(redis_section(config, redis_url, queue)) as connected:
        found = _letter(connected, letter)
    try:
        job: Any = read_map(found.payload, MAX_PAYLOAD_BYTES)[0]
        jsonlib.dumps(job)
    except (InvalidRequest, TypeError, ValueError):
        job = found.payload.hex()
    print_json({**_facts(found), "job": job})


@dead.command("retry")
def dead_retry(
    letter: Annotated[str, typer.Argument(metavar="ID")],
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """Submit the job again under a new id (JOB.r1, then JOB.r2), which is printed; the dead letter goes."""
    with client(redis_section(config, redis_url, queue)) as connected:
        print(connected.retry_dead_letter(_letter(connected, letter)))


@dead.command("drop")
def dead_drop(
    letter: Annotated[str, typer.Argument(metavar="ID")],
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """Delete a dead letter for good."""
    with client(redis_section(config, redis_url, queue)) as connected:
        connected.drop_dead_letter(_letter(connected, letter).entry_id)


def _letter(connected: SyncClient, entry_id: str) -> DeadLetter:
    found = connected.dead_letter(entry_id)
    if found is None:
        raise NotFound(f"there is no dead letter {entry_id}; `worker dead ls` lists them")
    return found


def _facts(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.entry_id,
        "job_id": letter.job_id,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "last_error": letter.last_error,
    }


def _print_rows(rows: Iterable[Mapping[str, Any]], json: bool, nothing: str) -> None:
    """A JSON object a line, or a table for people."""
    listed = list(rows)
    if json:
        for row in listed:
            print_json(dict(row))
        return
    if not listed:
        print(nothing)
        return
    table = Table(box=None, pad_edge=False)
    for column in listed[0]:
        table.add_column(column, overflow="fold")
    for row in listed:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console().print(table)
