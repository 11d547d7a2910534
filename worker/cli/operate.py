"""Operations: `worker jobs`, `workers`, `drain`, `health` and `dead`."""

import http.client
import json as jsonlib
import sys
import time
from typing import Annotated, Any

import typer

from worker.cli.console import JsonOption, plain, print_json
from worker.cli.remote import ConfigOption, QueueOption, UrlOption, client
from worker.cli.table import print_table
from worker.config import load_settings
from worker.errors import InvalidRequest, WorkerError
from worker.jobs.client import SyncClient
from worker.jobs.keys import START, is_entry_id, split_id
from worker.jobs.payload import read_map
from worker.jobs.queue_entries import DeadLetter, entry_state

dead = typer.Typer(help="Dead letters: jobs that failed repeatedly.", no_args_is_help=True)

LetterArgument = Annotated[str, typer.Argument(metavar="ID", help="Id from `worker dead ls`.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Id of a worker, or the --name of one or more.")]

_HEALTH_TIMEOUT_S = 3.0
_PAGE = 10
"""Dead letters that are read at once, with their payloads."""


class NotFound(WorkerError):
    """No worker, job or dead letter has that name."""

    code = "NOT_FOUND"


class Unhealthy(WorkerError):
    """The worker's HTTP port did not reply."""

    code = "UNHEALTHY"


def worker_id(connected: SyncClient, name: str) -> str:
    """The id of the live worker named `name`; else `name`, which may be a stopped one's id."""
    ids = _worker_ids(connected, name)
    if len(ids) > 1:
        raise NotFound(f"{len(ids)} workers are named {name}; pass one of their ids: {', '.join(sorted(ids))}")
    return ids[0] if ids else name


def _worker_ids(connected: SyncClient, name: str) -> list[str]:
    return [each for each, status in connected.workers().items() if name in (each, status.get("name"))]


def jobs(
    count: Annotated[int, typer.Option(min=1, help="Maximum number of jobs.")] = 100,
    json: JsonOption = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """List the jobs of the queue, oldest first, with their workers and ages.

    A job is `orphaned` if its worker has not renewed it for `lease.lease_s`.
    """
    lease_ms = load_settings(config).lease.lease_s * 1000
    with client(config, redis_url, queue) as connected:
        entries, total = connected.queue(count), connected.queue_length()
    now_ms = time.time() * 1000
    rows = [
        {
            "job_id": entry.job_id,
            "state": entry_state(entry.idle_ms, lease_ms),
            "age_s": round(max(0.0, now_ms - int(entry.entry_id.partition("-")[0])) / 1000, 1),
            "worker": entry.worker,
            "deliveries": entry.deliveries,
            "entry": entry.entry_id,
        }
        for entry in entries
    ]
    _print_rows(rows, json, "the queue is empty", required=2)
    if total > len(rows):
        message = f"{len(rows):,} of {total:,} jobs, the oldest; --count N shows more"
        print(message, file=sys.stderr if json else sys.stdout)


def workers(
    json: JsonOption = False, config: ConfigOption = None, redis_url: UrlOption = None, queue: QueueOption = None
) -> None:
    """List the live workers and their status."""
    with client(config, redis_url, queue) as connected:
        statuses = connected.workers()
    columns = (
        *("state", "model", "device", "queue", "running", "waiting", "preempted", "kv_blocks_used"),
        *("jobs", "degraded", "host", "pid", "http_port"),
    )
    rows: list[dict[str, Any]] = [
        {"worker": name, **(status if json else {key: status.get(key) for key in columns})}
        for name, status in sorted(statuses.items())
    ]
    _print_rows(rows, json, "no live workers", required=3)


def drain(
    name: NameArgument, config: ConfigOption = None, redis_url: UrlOption = None, queue: QueueOption = None
) -> None:
    """Drain a worker: it takes no more jobs, finishes the running one in its grace period, ends."""
    with client(config, redis_url, queue) as connected:
        ids = _worker_ids(connected, name)
        if not ids:
            raise NotFound(f"no live worker is named {name}; `worker workers` lists them")
        connected.drain(name)
    for each in ids:
        print(each)


def health(
    url: Annotated[str | None, typer.Option(help="HOST:PORT; by default from the settings.")] = None,
    ready: Annotated[bool, typer.Option("--ready", help="Check readiness instead of liveness.")] = False,
    config: ConfigOption = None,
) -> None:
    """Query a worker's HTTP port: print the reply; exit code 0 if healthy, 1 if not.

    For a container's health check; with --ready for a load balancer's.
    """
    settings = load_settings(config).http
    host, _, port = (url or f"{settings.host}:{settings.port}").removeprefix("http://").rstrip("/").rpartition(":")
    if not port.isdigit():
        raise typer.BadParameter(f"{url!r} is not HOST:PORT", param_hint="--url")
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    path = "/readyz" if ready else "/livez"
    connection = http.client.HTTPConnection(host, int(port), timeout=_HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
        message = f"http://{host}:{port}{path} does not reply ({reason}); start `worker run` or pass --url"
        raise Unhealthy(message) from None
    finally:
        connection.close()
    print(body)
    raise typer.Exit(0 if response.status == http.client.OK else 1)


@dead.command("ls")
def dead_ls(
    count: Annotated[int, typer.Option(min=1, help="Maximum number of dead letters.")] = 100,
    json: JsonOption = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """List the dead letters, oldest first."""
    with client(config, redis_url, queue) as connected:
        letters, total = connected.dead_letters(count), connected.dead_letter_count()
    _print_rows([_summary(letter) for letter in letters], json, "no dead letters", required=3)
    if total > len(letters):
        message = f"{len(letters):,} of {total:,} dead letters, the oldest; --count N shows more"
        print(message, file=sys.stderr if json else sys.stdout)


@dead.command("show")
def dead_show(
    letter: LetterArgument, config: ConfigOption = None, redis_url: UrlOption = None, queue: QueueOption = None
) -> None:
    """Print one dead letter as JSON, including the job as submitted."""
    with client(config, redis_url, queue) as connected:
        found = _letter(connected, letter)
    try:
        job: Any = read_map(found.payload)[0]
        jsonlib.dumps(job, allow_nan=False)
    except (InvalidRequest, TypeError, ValueError, RecursionError):
        job = found.payload.hex()
    print_json({**_summary(found), "job": job})


@dead.command("retry")
def dead_retry(
    letter: LetterArgument, config: ConfigOption = None, redis_url: UrlOption = None, queue: QueueOption = None
) -> None:
    """Resubmit the job as JOB.r1 (then JOB.r2), print that id, and delete the dead letter."""
    with client(config, redis_url, queue) as connected:
        print(connected.retry_dead_letter(_letter(connected, letter)))


@dead.command("rm")
@dead.command("drop", hidden=True)  # its former name
def dead_rm(
    letters: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids from `worker dead ls`.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All dead letters of the queue that exist now.")] = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """Delete dead letters, with the jobs in them, and print their ids."""
    if bool(letters) == every:
        raise typer.BadParameter("pass ids, or --all without ids", param_hint="ID...")
    missing = []
    with client(config, redis_url, queue) as connected:
        ids = _distinct(letters) if letters else _letter_ids(connected)
        for letter in ids:
            if connected.drop_dead_letter(letter):
                print(plain(letter))
            else:
                missing.append(plain(letter))
    if letters and missing:
        raise NotFound(f"no dead letter {', '.join(missing)}: unknown or deleted already; `worker dead ls` lists them")
    if not ids:
        print("no dead letters", file=sys.stderr)


def _distinct(letters: list[str]) -> list[str]:
    """Each id once: `5` is 5-0."""
    return list({split_id(each) if is_entry_id(each) else each: each for each in letters}.values())


def _letter_ids(connected: SyncClient) -> list[str]:
    """The ids of the dead letters that exist now, oldest first."""
    ids: list[str] = []
    count = connected.dead_letter_count()
    while len(ids) < count and (page := connected.dead_letters(_PAGE, ids[-1] if ids else START)):
        ids += [letter.entry_id for letter in page]
    return ids[:count]


def _letter(connected: SyncClient, entry_id: str) -> DeadLetter:
    letter = connected.dead_letter(entry_id)
    if letter is None:
        raise NotFound(f"no dead letter {plain(entry_id)}; `worker dead ls` lists them")
    return letter


def _summary(letter: DeadLetter) -> dict[str, Any]:
    """All of a dead letter but its payload."""
    return {"id": letter.entry_id} | {
        name: getattr(letter, name) for name in ("job_id", "reason", "attempts", "last_error")
    }


def _print_rows(rows: list[dict[str, Any]], json: bool, empty: str, required: int) -> None:
    """Print one JSON object per line, or a table."""
    if json:
        for row in rows:
            print_json(row)
    elif rows:
        print_table(rows, required)
    else:
        print(empty)
