"""`worker generate` after argument parsing: one job on an engine in this process, and its output.

Read next: `worker/runtime.py`, `worker/answer.py`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import typer

from worker import runtime
from worker.answer import Answer, prompt_ids
from worker.cli.console import JsonLines, Terminal, model_path, progress_bar
from worker.config import load_settings
from worker.errors import Internal, WorkerError
from worker.jobs.events import End, Token
from worker.jobs.protocol import Job, Limits


def answer_one(model: str, fields: Mapping[str, Any], flags: Mapping[str, Any], *, json: bool) -> None:
    """Load `model` and answer the job of the fields that are not None.

    Exits with the exit code of an error.
    """
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


@dataclass(slots=True)
class _Stats:
    """Statistics of the answer; times are seconds of `time.perf_counter`."""

    began: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from the start to the first token."""
        return (self.first - self.began) * 1000

    @property
    def decode_ms(self) -> float:
        """Milliseconds from the first token to the last."""
        return (self.last - self.first) * 1000

    def count(self) -> None:
        """Count a token now."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1


def run_job(loaded: runtime.LoadedModel, job: Job, output: Terminal | JsonLines) -> None:
    """Answer one job on this thread. Raises InvalidRequest, and what the engine raises."""
    prompt = prompt_ids(job, loaded.tokenizer, datetime.now(UTC))
    limits = Limits(loaded.name, loaded.vocab_size, loaded.engine.context)
    resolved = job.resolve(limits, len(prompt), "0-0")
    answer = Answer(job, resolved, loaded.tokenizer, prompt)
    output.started(resolved)
    stats = _Stats(time.perf_counter())
    for token in _tokens(loaded, answer):
        stats.count()
        output.token(token)
    assert answer.finish_reason is not None, "the engine became idle before the answer ended"
    output.ended(
        End(
            finish_reason=answer.finish_reason,
            tokens_out=stats.tokens,
            prompt_tokens=len(prompt),
            ttft_ms=round(stats.ttft_ms, 2),
            decode_ms=round(stats.decode_ms, 2),
            stop_sequence=answer.stop_sequence,
        )
    )


def _tokens(loaded: runtime.LoadedModel, answer: Answer) -> Iterator[Token]:
    """Yield every published token of the answer, as the engine generates it."""
    loaded.engine.add(answer.sequence)
    while answer.finish_reason is None and not loaded.engine.idle:
        for generated in loaded.engine.step():
            token = answer.push(generated)
            if token:
                yield token
    loaded.engine.abort(answer.sequence.id)
