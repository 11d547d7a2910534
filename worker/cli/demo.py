"""`worker demo`: get the small real model, answer two chat prompts, say what to type next."""

from __future__ import annotations

import uuid

from rich.console import Console

from worker import hub, runtime
from worker.cli.console import progress_bar
from worker.cli.generate import Terminal, run_job
from worker.config import load_settings
from worker.jobs.protocol import Job

MODEL = "smollm2"
PROMPTS = ("Explain in two sentences why the sky is blue.", "Write a haiku about a GPU that waits for work.")


def demo() -> None:
    """Pull SmolLM2 (98 MB) if it isn't there, chat with it twice, and end."""
    console = Console()
    settings = load_settings(flags={"model.context": 2048})
    with progress_bar(f"pulling {MODEL}") as progress:
        path = hub.pull(MODEL, settings.hub.cache, progress)
    with progress_bar("loading") as progress:
        loaded = runtime.load(path, settings.model, settings.engine, progress)
    for prompt in PROMPTS:
        console.print(f"\n[bold]> {prompt}[/bold]")
        job = Job.parse(
            {
                "job_id": f"demo-{uuid.uuid4()}",
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0.7,
                "top_p": 0.9,
                "seed": 42,
                "max_tokens": 96,
            }
        )
        run_job(loaded, job, Terminal())
    console.print(
        f"\n[bold]Next[/bold]\n"
        f'  .venv/bin/worker generate {MODEL} "Why is the sea salty?" --chat    chat with it yourself\n'
        f"  .venv/bin/worker inspect {MODEL}                                    what is inside, what it needs\n"
        f'  .venv/bin/worker tokenize {MODEL} "Hello world"                     ids and pieces\n'
        f"  .venv/bin/worker pull hf:ORG/REPO/FILE.gguf                        another model\n"
        f"  make test                                                          the whole suite\n",
        highlight=False,
        soft_wrap=True,
    )
