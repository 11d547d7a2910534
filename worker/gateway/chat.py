"""`POST /v1/chat/completions`: the request's fields, its jobs, the response."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from worker.gateway.answer import ChoiceReader, usage_of
from worker.gateway.chat_chunks import ChatChunks, CollectedChoice
from worker.gateway.chat_fields import job_messages, tool_fields
from worker.gateway.chunks import head, stream
from worker.gateway.context import call_of, context_of
from worker.gateway.errors import invalid
from worker.gateway.jobs import JobGroup
from worker.gateway.request import VLLM_NEUTRAL, Choices, SamplingFields, StreamOptions, choice_jobs, read_body
from worker.gateway.response_format import job_format
from worker.gateway.sse import EventStream, unless_disconnected

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(SamplingFields):
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
    model: str | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    """vLLM's form of `response_format`."""
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options: only with stream", "stream_options")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs: only with logprobs", "top_logprobs")
        if self.response_format is not None and self.structured_outputs is not None:
            raise invalid("structured_outputs: only without response_format", "structured_outputs")
        return self

    def jobs(self, model: str) -> list[dict[str, Any]]:
        """The job of each choice. Raises status 400."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        job = {
            **self.sampling(),
            **tool_fields(self.tools, self.tool_choice),
            "model": model,
            "messages": job_messages(self.messages),
            "max_tokens": max_tokens,
            "chat_template_kwargs": self._template_variables(),
            "response_format": job_format(self.response_format, self.structured_outputs),
            "tenant": self.user or None,
        }
        if self.logprobs:
            job |= {"logprobs": self.top_logprobs or 0, "token_bytes": True}
        return choice_jobs({name: value for name, value in job.items() if value is not None}, self.n or 1)

    def _template_variables(self) -> dict[str, Any] | None:
        """Variables of the chat template: the effort, or a family's switch for none."""
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
        if self.reasoning_effort == "none":
            variables["enable_thinking"] = False
        return variables | (self.chat_template_kwargs or {}) or None


async def chat_completions(request: Request) -> Response:
    """Answer a chat, streamed or as one object."""
    context, call = context_of(request), call_of(request)
    body = ChatRequest.parse(await read_body(request))
    model = await context.models.require(body.model, call.caller)
    group = JobGroup(context, call, "chatcmpl-", body.jobs(model.name))
    parallel = body.parallel_tool_calls is not False
    readers = [ChoiceReader(run.id, logprobs=bool(body.logprobs), parallel_tool_calls=parallel) for run in group.runs]
    if not body.stream:
        return await unless_disconnected(request, _collect(group, readers, model.name, logprobs=bool(body.logprobs)))
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    chunks = ChatChunks(group, readers, model.name, include_usage=include_usage)
    return EventStream(context, stream(group, chunks))


async def _collect(group: JobGroup, readers: list[ChoiceReader], model: str, *, logprobs: bool) -> Response:
    choices = [CollectedChoice(index, reader) for index, reader in enumerate(readers)]
    try:
        await group.start()
        async with aclosing(group.pages()) as pages:
            async for index, page in pages:
                choices[index].add(page)
    finally:
        group.close()
    answer = head(group.id, "chat.completion", model, readers)
    answer["choices"] = [choice.to_api(logprobs=logprobs) for choice in choices]
    return JSONResponse(answer | {"usage": usage_of(readers).to_api()})
