"""Files of tenants in Redis: uploaded inputs of batches, and their outputs.

A file's bytes are numbered chunks of one hash, so that a write can be repeated and a file of many
megabytes passes through a gateway in pieces. Its description is written last: a file whose upload
was interrupted does not exist, and its chunks expire. Read `batch_store.py` next.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any, Self

from worker.errors import EventsLost
from worker.gateway.errors import ApiError
from worker.jobs.documents import Documents, file_data_key, file_key, files_key

CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The description of a file. Times in seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    chunks: int
    created_at: int
    expires_at: int

    def to_api(self) -> dict[str, Any]:
        """OpenAI's file object."""
        fields = {name: getattr(self, name) for name in ("id", "bytes", "created_at", "expires_at", "filename")}
        return fields | {"object": "file", "purpose": self.purpose, "status": "processed"}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read a stored description."""
        texts = {name: value.decode() for name, value in fields.items()}
        return cls(**texts | {name: int(texts[name]) for name in ("bytes", "chunks", "created_at", "expires_at")})


class FileStore:
    """The files of all tenants; they expire after `retention_s`."""

    def __init__(self, documents: Documents, retention_s: float) -> None:
        self._documents = documents
        self._retention_s = retention_s

    async def write(
        self,
        content: AsyncIterator[bytes],
        *,
        tenant: str,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        file_id: str | None = None,
    ) -> StoredFile:
        """Store a file under a new id, or under `file_id`, which replaces what it had."""
        file_id = file_id or f"file-{uuid.uuid4().hex}"
        keep_s = int(min(self._retention_s, expires_after_s or self._retention_s))
        data, count, size = file_data_key(file_id), 0, 0
        await self._documents.delete(data)
        async for chunk in _in_chunks(content):
            await self._documents.put(data, {str(count): chunk}, keep_s * 1000)
            count, size = count + 1, size + len(chunk)
        now_ms = int(time.time() * 1000)
        now_s = now_ms // 1000
        file = StoredFile(file_id, tenant, filename, purpose, size, count, now_s, now_s + keep_s)
        await self._documents.put(file_key(file_id), {k: str(v) for k, v in asdict(file).items()}, keep_s * 1000)
        await self._documents.enlist(files_key(tenant), file_id, now_ms, int(self._retention_s * 1000))
        return file

    async def find(self, file_id: str, tenant: str) -> StoredFile:
        """The description of a tenant's file. Raises status 404."""
        fields = await self._documents.get(file_key(file_id))
        file = StoredFile.of(fields) if fields else None
        if file is None or file.tenant != tenant:
            raise ApiError(
                HTTPStatus.NOT_FOUND, f"no file has the id {file_id}", code="file_not_found", param="file_id"
            )
        return file

    async def content(self, file: StoredFile) -> AsyncIterator[bytes]:
        """Yield the bytes of a file in chunks. Raises EventsLost if it expires meanwhile."""
        for number in range(file.chunks):
            (chunk,) = await self._documents.values(file_data_key(file.id), [str(number)])
            if chunk is None:
                raise EventsLost(f"the file {file.id} has expired or was deleted while it was read")
            yield chunk

    async def lines(self, file: StoredFile) -> AsyncIterator[bytes]:
        """Yield the lines of a file without their ends, empty ones included."""
        rest = b""
        async for chunk in self.content(file):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line
        if rest:
            yield rest

    async def ids(self, tenant: str) -> list[str]:
        """The ids of a tenant's files, the newest first; some may have expired."""
        return await self._documents.listed(files_key(tenant))

    async def delete(self, file: StoredFile) -> None:
        """Delete a file."""
        await self._documents.delete(file_key(file.id))
        await self._documents.delete(file_data_key(file.id))
        await self._documents.unlist(files_key(file.tenant), file.id)


async def _in_chunks(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the content in pieces of `CHUNK_BYTES`, the last one shorter."""
    buffer = bytearray()
    async for piece in content:
        buffer += piece
        while len(buffer) >= CHUNK_BYTES:
            yield bytes(buffer[:CHUNK_BYTES])
            del buffer[:CHUNK_BYTES]
    if buffer:
        yield bytes(buffer)
