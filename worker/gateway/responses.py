"""`/v1/responses`: create, retrieve, cancel and delete responses, streamed or as objects.

| response | its job | when the client disconnects |
| --- | --- | --- |
| foreground | is waited for | is cancelled, see `jobs.py` |
| `background` | runs by itself; any gateway retrieves the response and its events | goes on |

A response is stored unless `store` is false. `previous_response_id` continues a stored response
that has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.errors import InvalidRequest
from worker.gateway.context import GatewayContext, call_of, context_of
from worker.gateway.errors import ApiError, api_error, fields_named, invalid
from worker.gateway.jobs import EventPage, JobGroup, Position
from worker.gateway.request import read_body
from worker.gateway.response_store import ResponseStore, StoredResponse, not_found
from worker.gateway.responses_events import PREFIX, ApiEvent, ResponseEvents
from worker.gateway.responses_request import FIELD_NAMES, InputItems, ResponsesRequest, messages_of
from worker.gateway.sse import EventStream, encode, to_json, unless_disconnected
from worker.jobs.keys import START

CANCEL_S = 2.0
"""Time for which the answer to a cancellation waits for the worker to stop."""
_OUTPUT: TypeAdapter[list[Any]] = TypeAdapter(InputItems)


@dataclass(slots=True)
class _Creation:
    """One request that creates a response, or attaches to one that it has created before."""

    group: JobGroup
    store: ResponseStore
    stored: StoredResponse
    is_kept: bool
    """Whether the response can be retrieved later."""
    exists: bool
    """Whether an earlier request has stored it."""
    events: ResponseEvents

    async def start(self) -> None:
        """Store the response, then submit its job. Raises as `JobGroup.start` does."""
        if not self.is_kept or self.exists:
            return await self.group.start()
        await self.store.put(self.stored)
        try:
            await self.group.start()
        except Exception:
            await self.store.discard(self.stored)
            raise
        if self.stored.background:
            self.group.reserve()


async def create(request: Request) -> Response:
    """Answer a request, streamed or as one object, or begin an answer in the background."""
    context, call = context_of(request), call_of(request)
    body = ResponsesRequest.parse(await read_body(request))
    model = await context.models.require(body.model, call.caller)
    store, tenant = ResponseStore(context), call.caller.tenant or ""
    conversation = [*await _earlier(store, body.previous_response_id, tenant), *body.messages()]
    group = JobGroup(context, call, PREFIX, [body.job_fields(conversation) | {"model": model.name}])
    attaches = call.idempotency_key is not None or group.resumed is not None
    found = await store.find(group.id, tenant) if attaches else None
    stored = found or StoredResponse(
        *(group.id, tenant, int(time.time()), body.echo(model.name), bool(body.background), body.wants_logprobs),
        conversation,
    )
    creation = _Creation(group, store, stored, body.is_stored, found is not None, stored.events())
    if body.stream:
        return EventStream(context, _stream(context, creation), partial(_encode_error, creation.events))
    return await unless_disconnected(request, _begin(creation) if body.background else _collect(context, creation))


async def _earlier(store: ResponseStore, response_id: str | None, tenant: str) -> list[dict[str, Any]]:
    """The messages of an earlier response and of those that it continued. Raises status 400."""
    if response_id is None:
        return []
    param, code = "previous_response_id", "previous_response_not_found"
    stored = await store.find(response_id, tenant)
    if stored is None:
        raise invalid(not_found(response_id).message, param, code)
    try:
        response = (await store.answer(stored)).response
    except ApiError as error:
        raise invalid(error.message, param, code) from None
    if response["status"] not in ("completed", "incomplete"):
        raise invalid(f"the response {response_id} has no answer: it is {response['status']}", param)
    output = response["output"]
    return [*stored.conversation, *(messages_of(_OUTPUT.validate_python(output)) if output else [])]


async def _begin(creation: _Creation) -> Response:
    """Start a background response."""
    try:
        with fields_named(FIELD_NAMES):
            await creation.start()
    except BaseException:
        creation.group.close()
        raise
    if creation.exists:
        return JSONResponse((await creation.store.answer(creation.stored)).response)
    list(creation.events.begin())
    return JSONResponse(creation.events.response)


async def _collect(context: GatewayContext, creation: _Creation) -> Response:
    """Wait for the answer."""
    events = creation.events
    list(events.begin())
    try:
        with fields_named(FIELD_NAMES):
            await creation.start()
            async for _, page in creation.group.pages():
                for item in page:
                    list(events.add(item))
    finally:
        creation.group.close()
        context.run_in_background(creation.store.ended(creation.stored.id))
    return JSONResponse(events.response)


async def _stream(context: GatewayContext, creation: _Creation) -> AsyncGenerator[bytes, None]:
    """Yield the events above those that the client has received.

    A job that fails before its first event has the status of its error, unless it is in the
    background.
    """
    group, events, background = creation.group, creation.events, creation.stored.background
    received = group.resumed.steps[0] if group.resumed else 0
    begun = started = False
    try:
        await creation.start()
        started = True
        if background:
            begun = True
            yield _encoded(group.id, events.begin(), START, received)
        async with contextlib.aclosing(group.pages()) as pages:
            async for _, page in pages:
                if page and not begun:
                    begun = True
                    yield _encoded(group.id, events.begin(), START, received)
                if encoded := _encoded_page(group.id, events, page, received):
                    yield encoded
    except (ApiError, InvalidRequest) as failure:
        error = api_error(failure)
        if error.event is None or not begun:
            error.rename(FIELD_NAMES)
            raise error from failure
        yield _encoded(group.id, events.fail(error.event), START, received)
    finally:
        if not (background and started):
            group.close()
        if events.is_over or not background:
            context.run_in_background(creation.store.ended(creation.stored.id))


def _encoded(group: str, events: Iterable[ApiEvent], entry_id: str, received: int) -> bytes:
    """The events whose sequence number is at least `received`, encoded."""
    return b"".join(
        encode(to_json(event), str(Position(group, entry_id, (event["sequence_number"] + 1,))), event["type"])
        for event in events
        if event["sequence_number"] >= received
    )


def _encoded_page(group: str, events: ResponseEvents, page: EventPage, received: int) -> bytes:
    """The events of a page of the job's events, encoded."""
    return b"".join(_encoded(group, events.add(item), item.entry_id, received) for item in page)


def _encode_error(events: ResponseEvents, error: ApiError) -> bytes:
    event = events.error(error.code, error.message, error.param)
    return encode(to_json(event), event="error")


async def retrieve(request: Request) -> Response:
    """Return a stored response, or stream its events after `starting_after`."""
    context, call = context_of(request), call_of(request)
    store = ResponseStore(context)
    stored = await store.require(request.path_params["response_id"], call.caller.tenant or "")
    if request.query_params.get("stream", "false") not in ("true", "1"):
        return JSONResponse((await store.answer(stored)).response)
    received = _received(request, call.last_event_id)
    if not await context.client.is_known(stored.id):
        raise not_found(stored.id)
    events = stored.events()
    return EventStream(context, _replay(context, store, stored, events, received), partial(_encode_error, events))


def _received(request: Request, last_event_id: str | None) -> int:
    """The number of events that the client has received."""
    after = request.query_params.get("starting_after")
    if after is not None:
        if not re.fullmatch(r"[0-9]{1,15}", after):
            raise invalid("starting_after: a sequence number", "starting_after")
        return int(after) + 1
    if last_event_id is None:
        return 0
    position = Position.parse(last_event_id)
    if position.group != request.path_params["response_id"]:
        raise invalid("Last-Event-ID belongs to another response", "Last-Event-ID")
    return position.steps[0]


async def _replay(
    context: GatewayContext, store: ResponseStore, stored: StoredResponse, events: ResponseEvents, received: int
) -> AsyncGenerator[bytes, None]:
    if encoded := _encoded(stored.id, events.begin(), START, received):
        yield encoded
    async with contextlib.aclosing(context.client.event_pages(stored.id)) as pages:
        async for page in pages:
            if encoded := _encoded_page(stored.id, events, page, received):
                yield encoded
    await store.ended(stored.id)


async def cancel(request: Request) -> Response:
    """Cancel a background response; return it as it is then."""
    context, call = context_of(request), call_of(request)
    store = ResponseStore(context)
    stored = await store.require(request.path_params["response_id"], call.caller.tenant or "")
    if not stored.background:
        raise invalid("only responses that were created with background can be cancelled", "response_id")
    if await context.client.cancel(stored.id) == "unknown":
        raise not_found(stored.id)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CANCEL_S):
            async for _ in context.client.event_pages(stored.id):
                pass
    return JSONResponse((await store.answer(stored)).response)


async def delete(request: Request) -> Response:
    """Delete a response, and cancel its job if that has not ended."""
    context, call = context_of(request), call_of(request)
    store = ResponseStore(context)
    stored = await store.require(request.path_params["response_id"], call.caller.tenant or "")
    await store.delete(stored)
    return JSONResponse({"id": stored.id, "object": "response", "deleted": True})


ROUTES = [
    Route("/v1/responses", create, methods=["POST"]),
    Route("/v1/responses/{response_id}", retrieve, methods=["GET"]),
    Route("/v1/responses/{response_id}", delete, methods=["DELETE"]),
    Route("/v1/responses/{response_id}/cancel", cancel, methods=["POST"]),
]
