"""`POST /v1/chat/completions`: the request's fields, its jobs, the response."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from worker.gateway.answer import ChoiceReader, usage_of
from worker.gateway.chat_chunks import ChatChunks, CollectedChoice
from worker.gateway.chat_fields import job_messages, tool_fields
from worker.gateway.chunks import head, stream
from worker.gateway.context import call_of, context_of
from worker.gateway.errors import fields_named, invalid
from worker.gateway.jobs import JobGroup
from worker.gateway.request import VLLM_NEUTRAL, TextFields, choice_jobs, read_body
from worker.gateway.response_format import format_names, job_format
from worker.gateway.responses_request import Effort, with_effort
from worker.gateway.sse import EventStream, unless_disconnected
from worker.jobs.fields import MAP_TAG, TEXT_TAG, one_of


class ChatRequest(TextFields):
    """The body of a chat completion."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            *("metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
            *("safety_identifier", "service_tier", "store", "verbosity"),
        }
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **VLLM_NEUTRAL,
        "add_generation_prompt": (True,),
        "audio": (),
        "continue_final_message": (False,),
        "echo": (False,),
        "function_call": ("auto", "none"),
        "functions": ([],),
        "include_reasoning": (True,),
        "modalities": (["text"],),
        "moderation": (),
        "web_search_options": (),
    }

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    tools: list[Any] | None = None
    tool_choice: (
        Annotated[Annotated[str, TEXT_TAG] | Annotated[dict[str, Any], MAP_TAG], one_of("text or a map")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _logprobs_requested(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs: only with logprobs", "top_logprobs")
        return self

    @property
    def field_names(self) -> dict[str, str]:
        """The request's names of fields by patterns of those of the job, for `fields_named`."""
        limit = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return limit | format_names(self.structured_outputs)

    def jobs(self, model: str) -> list[dict[str, Any]]:
        """The job of each choice. Raises status 400."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        job = {
            **self.sampling(),
            **tool_fields(self.tools, self.tool_choice),
            "model": model,
            "messages": job_messages(self.messages),
            "max_tokens": max_tokens,
            "chat_template_kwargs": with_effort(self.reasoning_effort, self.chat_template_kwargs),
            "response_format": job_format(self.response_format, self.structured_outputs),
            "tenant": self.user or None,
        }
        if self.logprobs:
            job |= {"logprobs": self.top_logprobs or 0, "token_bytes": True}
        return choice_jobs({name: value for name, value in job.items() if value is not None}, self.n or 1)


async def chat_completions(request: Request) -> Response:
    """Answer a chat, streamed or as one object."""
    context, call = context_of(request), call_of(request)
    body = ChatRequest.parse(await read_body(request))
    model = await context.models.require(body.model, call.caller)
    group = JobGroup(context, call, "chatcmpl-", body.jobs(model.name))
    parallel = body.parallel_tool_calls is not False
    readers = [ChoiceReader(run.id, logprobs=bool(body.logprobs), parallel_tool_calls=parallel) for run in group.runs]
    if not body.stream:
        return await unless_disconnected(request, _collect(group, readers, body, model.name))
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    chunks = ChatChunks(group, readers, model.name, include_usage=include_usage)
    return EventStream(context, stream(group, chunks, body.field_names))


async def _collect(group: JobGroup, readers: list[ChoiceReader], body: ChatRequest, model: str) -> Response:
    choices = [CollectedChoice(index, reader) for index, reader in enumerate(readers)]
    try:
        with fields_named(body.field_names):
            await group.start()
            async with aclosing(group.pages()) as pages:
                async for index, page in pages:
                    choices[index].add(page)
    finally:
        group.close()
    answer = head(group.id, "chat.completion", model, readers)
    answer["choices"] = [choice.to_api(logprobs=bool(body.logprobs)) for choice in choices]
    return JSONResponse(answer | {"usage": usage_of(readers).to_api()})
