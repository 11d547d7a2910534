"""`POST /v1/completions`: text without a chat template, for one prompt or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Self

from pydantic import model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from worker.gateway.answer import ChoiceDelta, ChoiceReader, usage_of
from worker.gateway.chunks import Chunks, head, stream
from worker.gateway.context import call_of, context_of
from worker.gateway.errors import fields_named, invalid
from worker.gateway.jobs import JobGroup
from worker.gateway.logprobs import Entry, alternatives, token_text
from worker.gateway.request import VLLM_NEUTRAL, TextFields, choice_jobs, read_body
from worker.gateway.response_format import format_names, job_format
from worker.gateway.sse import EventStream, to_json, unless_disconnected
from worker.jobs.fields import LIST_TAG, TEXT_TAG, one_of

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""
MAX_JOBS = 128
_KIND = "text_completion"


class CompletionRequest(TextFields):
    """The body of a completion."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **VLLM_NEUTRAL,
        "add_special_tokens": (True,),
        "suffix": (),
    }

    prompt: Annotated[Annotated[str, TEXT_TAG] | Annotated[list[Any], LIST_TAG], one_of("text or a list")]
    best_of: int | None = None
    logprobs: int | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of: must equal n; answers are not ranked", "best_of")
        if self.echo and self.logprobs is not None:
            raise invalid("echo: only without logprobs; prompts have no log-probabilities", "echo")
        return self

    @property
    def field_names(self) -> dict[str, str]:
        """The request's names of fields by patterns of those of the job, for `fields_named`."""
        return format_names(self.structured_outputs)

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """The job fields of each prompt: text or token ids. Raises status 400."""
        given = self.prompt
        if isinstance(given, str):
            return [{"prompt": given}]
        if given and all(type(each) is int for each in given):
            return [{"prompt_tokens": given}]
        forms = [_prompt(each, index) for index, each in enumerate(given)]
        if not 1 <= len(forms) * (self.n or 1) <= MAX_JOBS:
            raise invalid(f"prompt: 1 to {MAX_JOBS} prompts, times n", "prompt")
        return forms

    def jobs(self, model: str) -> list[dict[str, Any]]:
        """The jobs of each prompt's choices, prompt by prompt. Raises status 400."""
        common = {
            **self.sampling(),
            "model": model,
            "max_tokens": DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            "response_format": job_format(self.response_format, self.structured_outputs),
            "tenant": self.user or None,
        }
        if self.logprobs is not None:
            common |= {"logprobs": self.logprobs, "token_bytes": True}
        common = {name: value for name, value in common.items() if value is not None}
        return [job for prompt in self.prompts for job in choice_jobs(common | prompt, self.n or 1)]

    def echoes(self) -> list[str]:
        """The text that precedes each choice. Raises status 400 for a prompt of token ids."""
        if not self.echo:
            return [""] * (len(self.prompts) * (self.n or 1))
        if any("prompt" not in prompt for prompt in self.prompts):
            raise invalid("echo: only with prompts of text", "echo", "unsupported_value")
        return [prompt["prompt"] for prompt in self.prompts for _ in range(self.n or 1)]


def _prompt(given: Any, index: int) -> dict[str, Any]:
    if isinstance(given, str):
        return {"prompt": given}
    if isinstance(given, list) and given and all(type(each) is int for each in given):
        return {"prompt_tokens": given}
    raise invalid(f"prompt[{index}]: text or a list of token ids", f"prompt[{index}]", "invalid_value")


class TextChoice:
    """One choice as text with log-probabilities in the form of completions."""

    def __init__(self, reader: ChoiceReader, echo: str, *, logprobs: bool) -> None:
        self.reader = reader
        self._echo = echo
        self._logprobs = logprobs

    def text(self, delta: ChoiceDelta) -> str:
        """The text of a delta: completions have no channels."""
        return (self._echo if delta.begins else "") + delta.reasoning + delta.text

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        """The `logprobs` object of some entries."""
        if not self._logprobs:
            return None
        return {
            "tokens": [token_text(entry.data) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{text: logprob for text, _, logprob in alternatives(entry.token)} for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def finish(self) -> dict[str, Any]:
        """The last fields of an ended choice."""
        end = self.reader.end
        assert end is not None, "called at the end"
        return {"finish_reason": self.reader.finish_reason(), "stop_reason": end.stopped_by}


class TextChunks(Chunks):
    """The events of one streamed completion."""

    kind = _KIND

    def __init__(
        self, group: JobGroup, choices: Sequence[TextChoice], model: str, *, include_usage: bool, prompts: int
    ) -> None:
        readers = [choice.reader for choice in choices]
        super().__init__(group, readers, model, include_usage=include_usage, prompts=prompts)
        self._choices = choices

    def choice(self, index: int, delta: ChoiceDelta) -> str:
        """See `Chunks.choice`."""
        choice = self._choices[index]
        fields = {"index": index, "text": choice.text(delta)}
        fields["logprobs"] = choice.logprobs(delta.logprobs) if delta.logprobs else None
        return to_json(fields | (choice.finish() if delta.end else {"finish_reason": None, "stop_reason": None}))


async def completions(request: Request) -> Response:
    """Complete one or more prompts, streamed or as one object."""
    context, call = context_of(request), call_of(request)
    body = CompletionRequest.parse(await read_body(request))
    model = await context.models.require(body.model, call.caller)
    echoes, logprobs = body.echoes(), body.logprobs is not None
    group = JobGroup(context, call, "cmpl-", body.jobs(model.name))
    choices = [
        TextChoice(ChoiceReader(run.id, logprobs=logprobs), echo, logprobs=logprobs)
        for run, echo in zip(group.runs, echoes, strict=True)
    ]
    if not body.stream:
        return await unless_disconnected(request, _collect(group, choices, body, model.name))
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    chunks = TextChunks(group, choices, model.name, include_usage=include_usage, prompts=len(body.prompts))
    return EventStream(context, stream(group, chunks, body.field_names))


async def _collect(group: JobGroup, choices: Sequence[TextChoice], body: CompletionRequest, model: str) -> Response:
    deltas: list[list[ChoiceDelta]] = [[] for _ in choices]
    try:
        with fields_named(body.field_names):
            await group.start()
            async with aclosing(group.pages()) as pages:
                async for index, page in pages:
                    deltas[index] += choices[index].reader.read(page)
    finally:
        group.close()
    readers = [choice.reader for choice in choices]
    answer = head(group.id, _KIND, model, readers)
    answer["choices"] = [_whole(index, choice, deltas[index]) for index, choice in enumerate(choices)]
    return JSONResponse(answer | {"usage": usage_of(readers, len(body.prompts)).to_api()})


def _whole(index: int, choice: TextChoice, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
    entries = [entry for delta in deltas for entry in delta.logprobs]
    text = "".join(choice.text(delta) for delta in deltas)
    return {"index": index, "text": text, "logprobs": choice.logprobs(entries), **choice.finish()}
