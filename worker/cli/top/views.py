"""Columns of the tables of `worker top`, and the details of one row."""

from collections.abc import Iterator, Sequence

from rich.text import Text

from worker.cli.console import clock, size
from worker.cli.top.format import (
    COLORS,
    STATE_COLORS,
    Part,
    age,
    bar,
    cell,
    count,
    kv_use,
    latency,
    memory_bar,
    memory_whole,
    state_cell,
)
from worker.cli.top.snapshot import PURPOSES, ErrorRow, JobRow, LetterRow, QueueRow, WorkerRow
from worker.cli.top.table import Column

QUEUE_COLUMNS: Sequence[Column[QueueRow]] = (
    Column("QUEUE", 16, lambda row, _: cell(row.name), grows=1),
    Column("WAITING", 8, lambda row, _: f"{row.waiting:,}", right=True),
    Column("RUNNING", 8, lambda row, _: f"{row.running:,}", right=True),
    Column("OLDEST", 7, lambda row, _: age(row.oldest_s), right=True),
    Column("DEAD", 7, lambda row, _: Text(f"{row.dead:,}", STATE_COLORS["failed"] if row.dead else ""), right=True),
)


def worker_columns(*, color: bool) -> Sequence[Column[WorkerRow]]:
    """Columns of workers; without colors the bar of memory consists of letters."""
    return (
        Column("WORKER", 13, _worker, grows=2),
        Column("STATE", 8, lambda row, _: state_cell(state_of(row))),
        Column("MODEL", 10, lambda row, _: cell(row.model), grows=3),
        Column("JOBS", 5, lambda row, _: _jobs(row), right=True),
        Column("TOK/S", 6, lambda row, _: count(row.tokens_per_second), right=True),
        Column("TTFT50", 6, lambda row, _: latency(row.ttft_p50_s), right=True),
        Column("TTFT95", 6, lambda row, _: latency(row.ttft_p95_s), right=True),
        Column("KV", 4, lambda row, _: kv_use(row), right=True),
        Column("VRAM", 13, lambda row, width: memory_bar(row, width, color=color), grows=4),
        Column("QUEUE", 12, lambda row, _: cell(row.queue), grows=1, rank=2),
        Column("HOST", 12, lambda row, _: cell(row.host), rank=3),
        Column("UP", 6, lambda row, _: age(row.uptime_s), right=True, rank=1),
    )


def job_columns() -> Sequence[Column[JobRow]]:
    """Columns of jobs."""
    return (
        Column("JOB", 26, lambda row, _: cell(_job_id(row)), grows=3),
        Column("STATE", 8, lambda row, _: state_cell(row.state)),
        Column("AGE", 6, lambda row, _: age(row.age_s), right=True),
        Column("WORKER", 16, lambda row, _: cell(row.worker), grows=2),
        Column("QUEUE", 10, lambda row, _: cell(row.queue), grows=1),
        Column("TRIES", 5, lambda row, _: str(row.deliveries), right=True),
    )


def letter_columns() -> Sequence[Column[LetterRow]]:
    """Columns of dead letters."""
    return (
        Column("DEAD LETTER", 20, lambda row, _: cell(row.job_id or "(no id)"), grows=1),
        Column("AGE", 6, lambda row, _: age(row.age_s), right=True),
        Column("TRIES", 5, lambda row, _: str(row.attempts), right=True),
        Column("QUEUE", 8, lambda row, _: cell(row.queue)),
        Column("REASON", 15, lambda row, _: cell(row.reason)),
        Column("LAST ERROR", 18, lambda row, _: cell(row.last_error), grows=3),
    )


def error_columns() -> Sequence[Column[ErrorRow]]:
    """Columns of errors."""
    return (
        Column("TIME", 8, lambda row, _: time_of_day(row.ts_ms)),
        Column("ERROR", 17, lambda row, _: cell(row.code, STATE_COLORS["failed"])),
        Column("JOB", 14, lambda row, _: cell(row.job_id or "-"), grows=1),
        Column("WORKER", 12, lambda row, _: cell(row.worker), grows=1),
        Column("MESSAGE", 20, lambda row, _: cell(row.message), grows=4),
    )


def time_of_day(ts_ms: int) -> str:
    """As `clock`, in seconds."""
    return clock(ts_ms).partition(".")[0]


def state_of(row: WorkerRow) -> str:
    """The worker's state, or `stale`."""
    return "stale" if row.stale else row.state


def _worker(row: WorkerRow, width: int) -> Text:
    """The id; where it is too long its middle is left out, since its end distinguishes workers."""
    name = cell(row.id)
    if len(name.plain) > width:
        name = Text(f"{name.plain[: width - 7]}…{name.plain[-6:]}", end="")
    if row.degraded:
        name.stylize(STATE_COLORS["failed"])
    return name


def _jobs(row: WorkerRow) -> str:
    return str(row.running) if row.max_running is None else f"{row.running}/{row.max_running}"


def _job_id(row: JobRow) -> str:
    return row.job_id or f"(no readable id: entry {row.entry_id})"


def details_of(row: object, width: int, *, color: bool) -> tuple[str, Text]:
    """Title and lines of the details of a row of any table."""
    match row:
        case WorkerRow():
            return "Worker", _lines(_worker_details(row, width, color=color))
        case JobRow():
            fields = {"job": _job_id(row), "state": row.state, "queue": row.queue, "worker": row.worker or "-"}
            fields |= {"age": age(row.age_s), "deliveries": str(row.deliveries), "entry": row.entry_id}
            return "Job", _lines((name, cell(value)) for name, value in fields.items())
        case LetterRow():
            fields = {"job": row.job_id or "(no id)", "queue": row.queue, "reason": row.reason}
            fields |= {"attempts": str(row.attempts), "age": age(row.age_s), "entry": row.entry_id}
            fields |= {"last error": row.last_error or "-"}
            return "Dead letter", _lines((name, cell(value)) for name, value in fields.items())
        case ErrorRow():
            fields = {"time": time_of_day(row.ts_ms), "code": row.code, "job": row.job_id or "-", "worker": row.worker}
            return "Error", _lines((name, cell(value)) for name, value in (fields | {"message": row.message}).items())
        case QueueRow():
            fields = {"queue": row.name, "waiting": f"{row.waiting:,}", "running": f"{row.running:,}"}
            fields |= {"oldest waiting job": age(row.oldest_s), "dead letters": f"{row.dead:,}"}
            return "Queue", _lines((name, cell(value)) for name, value in fields.items())
        case _:
            raise TypeError(f"no details of {type(row).__name__}")


def worker_panel(row: WorkerRow | None, width: int, *, color: bool) -> Text:
    """Memory and load of the selected worker, a line each."""
    if row is None:
        return Text("no worker is selected", "dim")
    return _lines([("worker", cell(row.id, "bold")), *_load(row, width, color=color)])


def _worker_details(row: WorkerRow, width: int, *, color: bool) -> Iterator[tuple[str, Text]]:
    state = f"{row.state}, last heartbeat {age(row.silent_s)} ago" + (", stale" if row.stale else "")
    fields = {"worker": row.id, "state": state, "model": row.model, "device": row.device, "queue": row.queue}
    fields |= {"process": f"{row.pid} on {row.host}, version {row.version}, up {age(row.uptime_s)}"}
    if row.degraded:
        fields["degraded"] = "an allocation failed, and no job has succeeded since"
    for name, value in fields.items():
        yield name, cell(value)
    yield "jobs", Text(f"{_jobs(row)} running, {row.waiting} wait for KV blocks, {row.jobs:,} ended")
    yield from _load(row, width, color=color)


def _load(row: WorkerRow, width: int, *, color: bool) -> Iterator[tuple[str, Text]]:
    ttft = f"TTFT {latency(row.ttft_p50_s)} p50, {latency(row.ttft_p95_s)} p95"
    yield "speed", Text(f"{count(row.tokens_per_second)} tok/s, {ttft}")
    whole = memory_whole(row)
    for purpose in PURPOSES:
        part = Part(row.memory[purpose], purpose[0], COLORS[purpose])
        yield purpose, _labelled_bar(part, whole, size(row.memory[purpose]), width, color=color)
    yield "free", Text(f"{size(row.free)} of {size(whole)}")
    kv = f"{kv_use(row)} of {row.kv_blocks:,}"
    yield "KV blocks", _labelled_bar(Part(row.kv_blocks_used, "#", COLORS["kv"]), row.kv_blocks, kv, width, color=color)
    if row.preempted:
        yield "preempted", Text(f"{row.preempted:,}")


def _labelled_bar(part: Part, whole: int, label: str, width: int, *, color: bool) -> Text:
    return bar([part], whole, max(4, width - 15 - 14), color=color).append(f" {label}")


def _lines(fields: Sequence[tuple[str, Text]] | Iterator[tuple[str, Text]]) -> Text:
    lines = [Text.assemble((f"{name:<12} ", "dim"), value) for name, value in fields]
    return Text("\n").join(lines)
