"""`worker demo`: an embedded server, a worker, and two jobs whose answers are streamed.

Server and worker are child processes (`worker/embedded.py`) that end with the demo.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from worker.cli.console import plain
from worker.cli.local_worker import model_file, ready_worker
from worker.config import load_settings
from worker.embedded import Child, embedded_server, worker_process
from worker.jobs.client import SyncClient
from worker.jobs.events import End, ErrorEvent, Started, Token

_MODEL = "smollm2"
_PROMPTS = {
    "demo-paris": "What is the capital of France, and what is it famous for?",
    "demo-sea": "Write a short poem about the sea.",
}
_NEXT = ("run --model smollm2", 'submit --chat --wait "Why is the sea salty?"', "tail --all", "workers")
_GATEWAY_EXTRA = "pip install 'worker-orcd[gateway]'"
_SAMPLING = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 42}


def demo(
    model: Annotated[str, typer.Option(help="A .gguf file, or the name of a pulled model.")] = _MODEL,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of each answer.")] = 96,
) -> None:
    """Start a temporary server and a worker, and stream the answers of two chat jobs.

    Downloads SmolLM2 (98 MB) first unless it is in the cache.
    """
    console = Console(highlight=False, soft_wrap=True)
    command = sys.argv[0] if Path(sys.argv[0]).name == "worker" else "python -m worker"
    path = model_file(model, load_settings().hub)
    with (
        embedded_server() as url,
        worker_process("demo", path, url, "--context", "2048") as (process, log),
        SyncClient.from_url(url) as client,
    ):
        console.print(f"[bold]server[/bold]  {url}, until this command ends")
        with console.status("the worker loads its model"):
            name, status = _ready(client, process, log)
        about = f"{name}: {status['model']} on {status['device']}"
        console.print(f"[bold]worker[/bold]  {escape(plain(about))}")
        for job_id, prompt in _PROMPTS.items():
            messages = [{"role": "user", "content": prompt}]
            client.submit(job_id=job_id, messages=messages, max_tokens=max_tokens, **_SAMPLING)
        console.print(f"[bold]jobs[/bold]    {', '.join(_PROMPTS)}; to watch from another terminal:")
        for stream in (*_PROMPTS, f"--worker {name}", "--all"):
            console.print(f"[dim]          {escape(f'{command} tail {stream} --redis-url {url}')}[/dim]")
        for job_id, prompt in _PROMPTS.items():
            console.print(f"\n[bold]> {prompt}[/bold]")
            _show(client, job_id, console)
    console.print("\n[bold]Next[/bold], with your own Redis server at redis://127.0.0.1:6379:")
    for line in _NEXT:
        console.print(f"  {escape(command)} {line}")
    console.print("\nOpenAI's API at http://127.0.0.1:8000/v1, over that queue, or all of it in one command:")
    if find_spec("starlette") is None:
        console.print(f"  {escape(_GATEWAY_EXTRA)}")
    for line in ("gateway", f"serve {_MODEL}"):
        console.print(f"  {escape(command)} {line}")


def _ready(client: SyncClient, process: Child, log: IO[bytes]) -> tuple[str, dict[str, str]]:
    """Wait until the worker is ready; return its id and status. Exits with its log if it fails."""
    if found := ready_worker(client, process):
        return found
    code = process.stop()
    log.seek(0)
    sys.stderr.write(log.read().decode(errors="replace"))
    raise typer.Exit(code if code > 0 else 1)


def _show(client: SyncClient, job_id: str, console: Console) -> None:
    """Stream one answer, then its statistics."""
    waited_ms = 0
    for item in client.events(job_id):
        match item.event:
            case Started(started_at=started, enqueued_at=enqueued):
                waited_ms = started - enqueued
            case Token(t=text):
                console.out(text, end="", highlight=False)
                console.file.flush()
            case ErrorEvent() as error:
                console.print(f"\n[red]{error.code}[/red]: {escape(plain(error.message))}")
            case End() as end:
                rate = (end.tokens_out - 1) / end.decode_ms * 1000 if end.decode_ms else 0.0
                console.print(
                    f"\n[dim]waited {waited_ms} ms in the queue, first token after {end.ttft_ms:.0f} ms, "
                    f"{end.tokens_out} tokens at {rate:.1f} tokens/s, ended by {end.finish_reason}[/dim]"
                )
