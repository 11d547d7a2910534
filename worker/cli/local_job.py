"""`worker generate` after argument parsing: one job on an engine in this process, and its output.

Read next: `worker/runtime.py`, `worker/answer.py`.
"""

import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import typer

from worker import runtime
from worker.answer import Answer, AttemptStats, job_grammar, tokenize_job
from worker.cli.console import JsonLines, Terminal, model_path, progress_bar
from worker.config import load_settings
from worker.engine import FailedSequence
from worker.errors import Internal, WorkerError
from worker.jobs.events import End
from worker.jobs.protocol import Job


def answer_one(model: str, fields: Mapping[str, Any], flags: Mapping[str, Any], *, json: bool) -> None:
    """Load `model` and answer a job of the fields that are not None. Exits with an error's code."""
    output: Terminal | JsonLines = JsonLines() if json else Terminal()
    try:
        job = Job.parse({"job_id": f"cli-{uuid.uuid4()}", **{k: v for k, v in fields.items() if v is not None}})
        settings = load_settings(flags=flags)
        with progress_bar("loading") as progress:
            loaded = runtime.load(model_path(model), settings.model, settings.engine, progress)
        run_job(loaded, job, output)
    except WorkerError as error:
        output.failed(error)
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        if isinstance(output, JsonLines):
            output.failed(Internal(f"{type(error).__name__} while generating"))
        raise


def run_job(loaded: runtime.LoadedModel, job: Job, output: Terminal | JsonLines) -> None:
    """Answer one job on this thread. Raises InvalidRequest, and what the engine raises."""
    prompt, resolved = tokenize_job(job, loaded, datetime.now(UTC), "0-0")
    engine = loaded.engine
    answer = Answer(job, resolved, loaded.tokenizer, prompt, grammar=job_grammar(job, loaded.tokenizer, prompt))
    output.started(resolved)
    stats = AttemptStats(time.monotonic())
    engine.add(answer.sequence)
    while answer.finish_reason is None and not engine.idle:
        for generated in engine.step():
            if isinstance(generated, FailedSequence):
                raise generated.error
            if token := answer.push(generated):
                stats.count(token.t, [time.monotonic()])
                output.token(token)
    engine.abort(answer.sequence.id)
    assert answer.finish_reason is not None, "the engine became idle before the answer ended"
    output.ended(
        End(
            finish_reason=answer.finish_reason,
            tokens_out=stats.tokens,
            prompt_tokens=len(prompt),
            ttft_ms=round(stats.ttft_s * 1000, 2),
            decode_ms=round(stats.decode_s * 1000, 2),
            stop_sequence=answer.stop_sequence,
            stop_token=answer.stop_token,
        )
    )
