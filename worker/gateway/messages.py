"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from itertools import count

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.errors import EventsLost
from worker.gateway.context import call_of, context_of
from worker.gateway.errors import ApiError, fields_named
from worker.gateway.jobs import JobGroup, Position
from worker.gateway.messages_events import PREFIX, MessageEvents
from worker.gateway.messages_request import FIELD_NAMES, MessagesRequest, PromptRequest
from worker.gateway.request import read_body
from worker.gateway.sse import EventStream, encode, to_json, unless_disconnected
from worker.jobs.events import End, Started


async def create(request: Request) -> Response:
    """Answer a chat, streamed or as one message."""
    context, call = context_of(request), call_of(request)
    body = MessagesRequest.parse(await read_body(request))
    model = await context.models.require(body.model, call.caller)
    group = JobGroup(context, call, PREFIX, [body.job_fields() | {"model": model.name}])
    events = MessageEvents(
        group.id, model.name, shows_thinking=body.shows_thinking, parallel_calls=body.allows_parallel_calls
    )
    if body.stream:
        return EventStream(context, _stream(group, events), _encode_error)
    return await unless_disconnected(request, _collect(group, events))


async def _collect(group: JobGroup, events: MessageEvents) -> Response:
    try:
        with fields_named(FIELD_NAMES):
            await group.start()
            async for _, page in group.pages():
                for item in page:
                    list(events.add(item))
    finally:
        group.close()
    return JSONResponse(events.message)


async def _stream(group: JobGroup, events: MessageEvents) -> AsyncGenerator[bytes, None]:
    """Yield the events above those that the client has received."""
    received, steps = group.resumed.steps[0] if group.resumed else 0, count(1)
    try:
        with fields_named(FIELD_NAMES):
            await group.start()
            async with contextlib.aclosing(group.pages()) as pages:
                async for _, page in pages:
                    numbered = ((next(steps), item.entry_id, event) for item in page for event in events.add(item))
                    encoded = [
                        encode(to_json(event), str(Position(group.id, entry_id, (step,))), event["type"])
                        for step, entry_id, event in numbered
                        if step > received
                    ]
                    if encoded:
                        yield b"".join(encoded)
    finally:
        group.close()


def _encode_error(error: ApiError) -> bytes:
    return encode(to_json(error.anthropic_body()), event="error")


async def count_tokens(request: Request) -> Response:
    """Count the tokens of a prompt: a worker tokenizes it for a job that is cancelled then."""
    context, call = context_of(request), replace(call_of(request), idempotency_key=None, last_event_id=None)
    body = PromptRequest.parse(await read_body(request))
    model = await context.models.require(body.model, call.caller)
    group = JobGroup(context, call, "count_", [body.prompt_fields() | {"model": model.name, "max_tokens": 1}])
    return await unless_disconnected(request, _count(group))


async def _count(group: JobGroup) -> Response:
    try:
        with fields_named(FIELD_NAMES):
            await group.start()
            async with contextlib.aclosing(group.pages()) as pages:
                async for _, page in pages:
                    for item in page:
                        if isinstance(item.event, Started | End):
                            return JSONResponse({"input_tokens": item.event.prompt_tokens})
    finally:
        group.close()
    raise EventsLost(f"the job {group.id} ended without a start")


ROUTES = [
    Route("/v1/messages", create, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
]
