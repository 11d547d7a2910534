"""`worker generate`: one job with no server, streamed as it decodes."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from worker import runtime
from worker.answer import Answer, prompt_ids
from worker.cli.console import JsonOption, ModelArgument, model_path, print_json, progress_bar
from worker.config import load_settings
from worker.errors import Internal, WorkerError
from worker.jobs.events import End, ErrorEvent, Token
from worker.jobs.protocol import Job, Limits, Resolved

_SAMPLING = "Sampling"


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; with --chat the user's message.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: a system message before it.")] = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="Token ids instead of a prompt: 1,2,3.")] = None,
    special: Annotated[bool, typer.Option(help="Whether special tokens written in a raw prompt are special.")] = True,
    max_tokens: Annotated[int | None, typer.Option(help="At most so many tokens; by default up to 2048.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given up to 16 times.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.", rich_help_panel=_SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    min_p: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    frequency_penalty: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    presence_penalty: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    min_tokens: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", rich_help_panel=_SAMPLING)] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="Log-probabilities, with 0 to 20 alternatives a token.", rich_help_panel=_SAMPLING),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Longest prompt and answer together, in tokens.")] = None,
    backend: Annotated[str | None, typer.Option(help="cpu or gpu; by default a GPU if there is one.")] = None,
    json: JsonOption = False,
) -> None:
    """Answer one prompt, streaming it as it decodes.

    Give a PROMPT (raw, or with --chat a user's message) or --prompt-tokens. The text goes to stdout, figures to stderr.
    With --json every line is an event: started, token…, and last end or error.
    """
    fields = {
        "temperature": temperature, "seed": seed, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty, "min_tokens": min_tokens, "logprobs": logprobs,
        "max_tokens": max_tokens, "stop": stop or None, "ignore_eos": ignore_eos, "special": special,
        **_prompt_fields(prompt, chat, system, prompt_tokens),
    }  # fmt: skip
    output = JsonLines() if json else Terminal()
    try:
        job = Job.parse({"job_id": f"cli-{uuid.uuid4()}", **{k: v for k, v in fields.items() if v is not None}})
        flags = {"engine.backend": backend, "model.context": context}
        settings = load_settings(flags=flags)
        with progress_bar("loading") as progress:
            loaded = runtime.load(model_path(model), settings.model, settings.engine, progress)
        run_job(loaded, job, output)
    except WorkerError as error:
        output.failed(error)
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        if json:
            output.failed(Internal(f"{type(error).__name__} while generating"))
        raise


def _prompt_fields(prompt: str | None, chat: bool, system: str | None, tokens: str | None) -> dict[str, Any]:
    """The job's prompt, messages or prompt_tokens; what is missing or doubled is for the job's validation to say."""
    fields: dict[str, Any] = {"prompt": None if chat else prompt}
    if chat and prompt is not None:
        turns = [{"role": "system", "content": system}] if system is not None else []
        fields["messages"] = [*turns, {"role": "user", "content": prompt}]
    if tokens is not None:
        try:
            fields["prompt_tokens"] = [int(part) for part in tokens.split(",")]
        except ValueError:
            raise typer.BadParameter(
                f"{tokens!r} is no list of ids such as 1,2,3", param_hint="--prompt-tokens"
            ) from None
    return fields


@dataclass(slots=True)
class _Figures:
    """How the answer went; times are of `time.perf_counter`, in seconds."""

    began: float
    first: float = 0.0
    newest: float = 0.0
    tokens: int = 0

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from the start to the first token."""
        return (self.first - self.began) * 1000

    @property
    def decode_ms(self) -> float:
        """Milliseconds from the first token to the last."""
        return (self.newest - self.first) * 1000

    def count(self) -> None:
        """One more token, now."""
        self.newest = time.perf_counter()
        self.first = self.first or self.newest
        self.tokens += 1


def run_job(loaded: runtime.Loaded, job: Job, output: Terminal | JsonLines) -> None:
    """Answer one job on this thread. Raises InvalidRequest, and what the engine raises."""
    prompt = prompt_ids(job, loaded.tokenizer, datetime.now(UTC))
    limits = Limits(loaded.name, loaded.hparams.vocab_size, loaded.engine.context)
    resolved = job.resolve(limits, len(prompt), "0-0")
    answer = Answer(job, resolved, loaded.tokenizer, prompt)
    output.started(resolved)
    figures = _Figures(time.perf_counter())
    for token in _tokens(loaded, answer):
        figures.count()
        output.token(token)
    assert answer.finish_reason is not None, "the engine ran dry before the answer ended"
    output.ended(
        End(
            finish_reason=answer.finish_reason,
            tokens_out=figures.tokens,
            prompt_tokens=len(prompt),
            ttft_ms=round(figures.ttft_ms, 2),
            decode_ms=round(figures.decode_ms, 2),
            stop_sequence=answer.stop_sequence,
        )
    )


def _tokens(loaded: runtime.Loaded, answer: Answer) -> Iterator[Token]:
    """Every published token of the answer, as the engine draws it."""
    loaded.engine.add(answer.sequence)
    while answer.finish_reason is None and not loaded.engine.idle:
        for drawn in loaded.engine.step():
            token = answer.push(drawn)
            if token:
                yield token
    loaded.engine.abort(answer.sequence.id)


class Terminal:
    """For people: the text on stdout, figures on stderr."""

    def started(self, resolved: Resolved) -> None:
        """Nothing to say yet."""

    def token(self, token: Token) -> None:
        """The token's text."""
        sys.stdout.write(token.t)
        sys.stdout.flush()

    def ended(self, end: End) -> None:
        """How it went."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        rate = f", {(end.tokens_out - 1) / end.decode_ms * 1000:.1f} tokens/s" if end.tokens_out > 1 else ""
        print(
            f"[{end.finish_reason}: {end.prompt_tokens} prompt tokens, {end.tokens_out} drawn, "
            f"the first after {end.ttft_ms:.0f} ms{rate}]",
            file=sys.stderr,
        )

    def failed(self, error: WorkerError) -> None:
        """One sentence."""
        print(f"worker: {error.code}: {error.message}", file=sys.stderr)


class JsonLines:
    """For programs: one event a line; the last is `end` or `error`."""

    def started(self, resolved: Resolved) -> None:
        """What was resolved, the seed among it."""
        print_json(
            {
                "event": "started",
                "model": resolved.model,
                "seed": resolved.seed,
                "max_tokens": resolved.max_tokens,
                "prompt_tokens": resolved.prompt_len,
            }
        )

    def token(self, token: Token) -> None:
        """Index, id, text, and where asked for log-probabilities."""
        print_json({"event": "token", **token.to_fields()})

    def ended(self, end: End) -> None:
        """Why and how fast."""
        print_json({"event": End.kind, **end.to_fields()})

    def failed(self, error: WorkerError) -> None:
        """The same error event that a job's stream would get."""
        print_json({"event": ErrorEvent.kind, **ErrorEvent.of(error).to_fields()})
