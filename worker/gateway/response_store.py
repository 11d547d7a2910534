"""Stored responses: the request in a document beside its job, the answer in the job's own events.

A response is found by any gateway as long as both exist. The document expires with the events,
`retention_s` after the answer was read to its end, at the latest `UNREAD_S` after the request.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from worker.errors import WorkerError
from worker.gateway.context import GatewayContext
from worker.gateway.errors import ApiError
from worker.gateway.responses_events import PREFIX, ResponseEvents
from worker.jobs.documents import response_key
from worker.jobs.streams import Disconnected

UNREAD_S = 7 * 24 * 3600
"""As long as a job's state is kept while its queue entry is not settled."""
DELETED_S = 60.0
"""The state of a deleted response's job outlives the worker's settlement of its queue entry."""
_ID = re.compile(PREFIX + "[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """What the answer's events lack."""

    id: str
    tenant: str
    created_s: int
    echo: dict[str, Any]
    background: bool
    logprobs: bool
    conversation: list[dict[str, Any]]
    """The job's messages without the instructions, which later responses continue."""

    def events(self) -> ResponseEvents:
        """A translation of the job's events from the first on."""
        return ResponseEvents(self.id, self.echo, self.created_s, background=self.background, logprobs=self.logprobs)


class ResponseStore:
    """The stored responses of all tenants."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._documents = context.client.documents

    async def put(self, stored: StoredResponse) -> None:
        """Store a response before its job is submitted."""
        fields = {"response": json.dumps(asdict(stored), ensure_ascii=False)}
        await self._documents.put(response_key(stored.id), fields, UNREAD_S * 1000)

    async def find(self, response_id: str, tenant: str) -> StoredResponse | None:
        """A tenant's response, None if it is unknown, was deleted or has expired."""
        if not _ID.fullmatch(response_id):
            return None
        fields = await self._documents.get(response_key(response_id))
        if "response" not in fields:
            return None
        stored = StoredResponse(**json.loads(fields["response"]))
        return stored if stored.tenant == tenant else None

    async def require(self, response_id: str, tenant: str) -> StoredResponse:
        """A tenant's response. Raises status 404."""
        stored = await self.find(response_id, tenant)
        if stored is None:
            raise not_found(response_id)
        return stored

    async def answer(self, stored: StoredResponse) -> ResponseEvents:
        """The answer so far. Raises status 404 if the job's events have expired."""
        events = stored.events()
        list(events.begin())
        items = await self._context.client.published(stored.id)
        if not items and not await self._context.client.is_known(stored.id):
            raise not_found(stored.id)
        for item in items:
            list(events.add(item))
        if events.is_over:
            await self.ended(stored.id)
        return events

    async def ended(self, response_id: str) -> None:
        """Have the document expire with the events of an ended job, if the server is there."""
        retention_ms = int(self._context.section.response_retention_s * 1000)
        with contextlib.suppress(Disconnected, WorkerError):
            await self._documents.shorten(response_key(response_id), retention_ms)

    async def discard(self, stored: StoredResponse) -> None:
        """Delete the document of a response whose job was refused."""
        await self._documents.delete(response_key(stored.id))

    async def delete(self, stored: StoredResponse) -> None:
        """Cancel the job if it has not ended, and delete what is stored."""
        outcome = await self._context.client.cancel(stored.id)
        await self._documents.delete(response_key(stored.id))
        if outcome == "over":
            await self._context.client.forget(stored.id, DELETED_S)


def not_found(response_id: str, param: str = "response_id", code: str = "response_not_found") -> ApiError:
    """Status 404 for a response."""
    message = f"no response has the id {response_id}: it is unknown, was not stored, or has expired"
    return ApiError(HTTPStatus.NOT_FOUND, message, code=code, param=param)
