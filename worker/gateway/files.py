"""`/v1/files`: inputs of batches, uploaded as forms, and the outputs of batches."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from worker.gateway.context import GatewayContext, call_of, context_of
from worker.gateway.errors import ApiError, invalid
from worker.gateway.file_store import CHUNK_BYTES, FileStore, StoredFile
from worker.gateway.request import is_number

MAX_PAGE = 10_000
_FORM_OVERHEAD = 64 * 1024
"""Bytes of a form besides its file."""
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")

T = TypeVar("T")


def file_store(context: GatewayContext) -> FileStore:
    """The files of the context's server."""
    return FileStore(context.client.documents, context.section.file_retention_s)


def tenant_of(request: Request) -> str:
    """The tenant whose files and batches a request concerns."""
    return call_of(request).caller.tenant or ""


async def upload(request: Request) -> Response:
    """Store a file of a form, of the purpose `batch`."""
    context = context_of(request)
    _check_size(request, context.section.max_file_bytes)
    try:
        async with request.form(max_files=1, max_fields=len(_FIELDS)) as form:
            file, expires_after_s = _checked(form)
            stored = await file_store(context).write(
                _read(file),
                tenant=tenant_of(request),
                filename=(file.filename or "file")[:256],
                purpose="batch",
                expires_after_s=expires_after_s,
            )
    except HTTPException as error:
        raise invalid(f"the body is not a form with a file: {error.detail}", code="invalid_form") from None
    return JSONResponse(stored.to_api())


def _check_size(request: Request, limit: int) -> None:
    length = request.headers.get("content-length", "")
    if not is_number(length):
        raise ApiError(HTTPStatus.LENGTH_REQUIRED, "the header Content-Length is required", code="length_required")
    if int(length) > limit + _FORM_OVERHEAD:
        message = f"the file has more than {limit} bytes"
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="file_too_large", param="file")


def _checked(form: FormData) -> tuple[UploadFile, int | None]:
    """The form's file, and the time in seconds after which it expires. Raises status 400."""
    if unknown := next((name for name in form if name not in _FIELDS), None):
        raise invalid(f"{unknown}: unknown or unsupported field", unknown, "unknown_parameter")
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise invalid("file: required, as a file of the form", "file", "missing_required_parameter")
    if form.get("purpose") != "batch":
        raise invalid("purpose: batch, the only one that this server has a use for", "purpose")
    seconds = form.get("expires_after[seconds]")
    if seconds is None:
        return file, None
    if not isinstance(seconds, str) or not re.fullmatch("[0-9]{1,9}", seconds) or int(seconds) < 3600:
        raise invalid("expires_after.seconds: at least 3600", "expires_after.seconds")
    return file, int(seconds)


async def _read(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(CHUNK_BYTES):
        yield chunk


async def list_files(request: Request) -> Response:
    """List the tenant's files, the newest first unless `order` is `asc`."""
    store, tenant = file_store(context_of(request)), tenant_of(request)
    ids = await store.ids(tenant)
    if (order := request.query_params.get("order", "desc")) not in ("asc", "desc"):
        raise invalid("order: asc or desc", "order")

    async def find(file_id: str) -> StoredFile | None:
        try:
            file = await store.find(file_id, tenant)
        except ApiError:
            return None
        return file if file.purpose == request.query_params.get("purpose", file.purpose) else None

    page, more = await paged(request, ids if order == "desc" else ids[::-1], find, MAX_PAGE)
    return JSONResponse(listing([file.to_api() for file in page], has_more=more))


async def paged(
    request: Request, ids: Sequence[str], find: Callable[[str], Awaitable[T | None]], default: int
) -> tuple[list[T], bool]:
    """The objects after `after`, at most `limit`, and whether there are more. Raises status 400."""
    limit = request.query_params.get("limit", str(default))
    if not re.fullmatch("[0-9]{1,5}", limit) or not 1 <= int(limit) <= MAX_PAGE:
        raise invalid(f"limit: 1 to {MAX_PAGE}", "limit")
    after = request.query_params.get("after")
    if after is not None and after not in ids:
        raise invalid("after: an id of the list", "after")
    left = ids if after is None else ids[ids.index(after) + 1 :]
    found: list[T] = []
    for each in left:
        if (item := await find(each)) is not None:
            if len(found) == int(limit):
                return found, True
            found.append(item)
    return found, False


def listing(items: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    ends = {"first_id": items[0]["id"] if items else None, "last_id": items[-1]["id"] if items else None}
    return {"object": "list", "data": items, **ends, "has_more": has_more}


async def retrieve(request: Request) -> Response:
    """Describe a file."""
    file = await file_store(context_of(request)).find(request.path_params["file_id"], tenant_of(request))
    return JSONResponse(file.to_api())


async def delete(request: Request) -> Response:
    """Delete a file."""
    store = file_store(context_of(request))
    file = await store.find(request.path_params["file_id"], tenant_of(request))
    await store.delete(file)
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


async def content(request: Request) -> Response:
    """Return the bytes of a file."""
    store = file_store(context_of(request))
    file = await store.find(request.path_params["file_id"], tenant_of(request))
    headers = {"content-length": str(file.bytes)}
    return StreamingResponse(store.content(file), headers=headers, media_type="application/octet-stream")


ROUTES = [
    Route("/v1/files", upload, methods=["POST"]),
    Route("/v1/files", list_files, methods=["GET"]),
    Route("/v1/files/{file_id}", retrieve, methods=["GET"]),
    Route("/v1/files/{file_id}", delete, methods=["DELETE"]),
    Route("/v1/files/{file_id}/content", content, methods=["GET"]),
]
