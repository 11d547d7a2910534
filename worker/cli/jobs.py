"""`worker submit`, `worker tail` and `worker cancel`: one job as its submitter sees it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.console import JsonOption, print_json
from worker.cli.operate import worker_id
from worker.cli.output import Terminal
from worker.cli.remote import ConfigOption, QueueOption, UrlOption, as_json, as_line, client, connect, redis_section
from worker.errors import InvalidRequest
from worker.jobs.events import End, ErrorEvent, Stopped, Token
from worker.jobs.keys import START

if TYPE_CHECKING:
    from worker.jobs.received import Received

_SAMPLING = "Sampling"


def submit(
    prompt: Annotated[str, typer.Argument(help="The prompt; with --chat the user's message.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: a system message before it.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stream the answer; without it, print the job's id.")] = False,
    model: Annotated[str | None, typer.Option(help="Only this model may answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most so many tokens; by default up to 2048.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given up to 16 times.")] = None,
    deadline_ms: Annotated[int | None, typer.Option(help="Give up so long after submission.")] = None,
    job_id: Annotated[str | None, typer.Option(help="Made up if not given.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.", rich_help_panel=_SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    min_p: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    min_tokens: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", rich_help_panel=_SAMPLING)] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities, with 0 to 20 alternatives.", rich_help_panel=_SAMPLING)
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """Put a job into the queue.

        worker submit --chat --wait "Why is the sky blue?"

        JOB=$(worker submit "Once upon a time" --max-tokens 50); worker tail $JOB

    With --wait the text goes to stdout and figures to stderr; with --json every line is an event. Exit codes: 0 the
    answer ended, 1 the job failed, 3 it was refused, 5 the server can't be reached. Ctrl-C leaves the job running.
    """
    turns = [{"role": "system", "content": system}] if system is not None else []
    fields: dict[str, Any] = {
        "job_id": job_id, "model": model, "max_tokens": max_tokens, "stop": stop or None, "deadline_ms": deadline_ms,
        "temperature": temperature, "seed": seed, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "min_tokens": min_tokens, "ignore_eos": ignore_eos or None, "logprobs": logprobs,
        "prompt": None if chat else prompt,
        "messages": [*turns, {"role": "user", "content": prompt}] if chat else None,
    }  # fmt: skip
    with client(redis_section(config, redis_url, queue)) as connected:
        job_id = connected.submit(**fields)
        if not wait:
            print_json({"job_id": job_id}) if json else print(job_id)
            return
        code = _show_answer(job_id, connected.events(job_id), json)
    raise typer.Exit(code)


def _show_answer(job_id: str, events: Iterator[Received], json: bool) -> int:
    """Stream one job to its end; the exit code."""
    terminal, failed = Terminal(), 1
    try:
        for item in events:
            if json:
                print_json(as_json(item))
            elif isinstance(item.event, Token):
                terminal.token(item.event)
            elif isinstance(item.event, End):
                terminal.ended(item.event)
            if isinstance(item.event, ErrorEvent):
                if not json:
                    print(f"\nworker: {item.event.code}: {item.event.message}", file=sys.stderr)
                return InvalidRequest.exit_code if item.event.code == InvalidRequest.code else failed
            if isinstance(item.event, End):
                return 0
    except KeyboardInterrupt:
        print(f"\nthe job goes on; `worker tail {job_id}` or `worker cancel {job_id}`", file=sys.stderr)
        raise
    print(f"worker: the events of job {job_id} have expired", file=sys.stderr)
    return failed


def tail(
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="A job's id.")] = None,
    worker: Annotated[str | None, typer.Option(metavar="NAME", help="A worker's own events instead.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every worker and every job of the queue.")] = False,
    since: Annotated[str | None, typer.Option("--from", metavar="ID", help="Only what comes after this entry.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """Show events as they come, one a line.

    A job is shown from its first event to its last, a worker from its start until it has stopped; both go on where
    --from says, which is the `resume` of a line of --json. --all begins now, or with --from at that time.
    """
    if (job is not None) + (worker is not None) + everything != 1:
        raise typer.BadParameter("give one of JOB, --worker NAME and --all")
    if since is not None and not re.fullmatch(r"\d{1,19}(-\d{1,19})?", since):
        raise typer.BadParameter(f"{since!r} is no entry id such as 1-5", param_hint="--from")
    section = redis_section(config, redis_url, queue)
    show = _shower(json)
    if everything:
        from worker.cli.watch import watch  # noqa: PLC0415  # `worker generate` doesn't wait for redis

        asyncio.run(watch(connect(section.url), section.queue, since, show))
        return
    with client(section) as connected:
        after = since or START
        if worker is not None:
            for item in connected.worker_events(worker_id(connected, worker), after):
                show(item)
                if isinstance(item.event, Stopped):
                    return
        for item in connected.events(job or "", after):
            show(item)


def _shower(json: bool) -> Callable[[Received], None]:
    def show(item: Received) -> None:
        print_json(as_json(item)) if json else print(as_line(item), flush=True)

    return show


def cancel(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")],
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueueOption = None,
) -> None:
    """Cancel a job, waiting or running. Harmless for one that has ended.

    Prints `cancelled` (it is over as such), `requested` (its worker stops at the next token) or `over`.
    """
    with client(redis_section(config, redis_url, queue)) as connected:
        print(connected.cancel(job))
