"""Documents of the gateway: hashes that expire, indices of them, and leases on work.

The interface of what is stored beside jobs: the requests of responses, files, batches.
`redis_documents.py` implements it. Every call touches one key, and its repetition after a lost
reply does no harm, except that `increment` may count twice.

| key | contents |
| --- | --- |
| `inf:{job:ID}:response` | request of a stored response, beside the job's events |
| `inf:{file:ID}:meta`, `inf:{file:ID}:data` | a file: description; bytes in numbered chunks |
| `inf:{batch:ID}:meta` | a batch: its description and counts |
| `inf:{batch:ID}:results` | lines of a batch that have ended: number to result |
| `inf:{batch:ID}:lease` | the gateway that runs a batch |
| `inf:files:TENANT`, `inf:batches:TENANT` | ids of a tenant's files and batches by time |
| `inf:batches-active` | ids of the batches that have not ended |
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

ACTIVE_BATCHES = "inf:batches-active"


def response_key(job_id: str) -> str:
    """Hash of the request whose answer is a job."""
    return f"inf:{{job:{job_id}}}:response"


def file_key(file_id: str) -> str:
    """Hash of a file's description."""
    return f"inf:{{file:{file_id}}}:meta"


def file_data_key(file_id: str) -> str:
    """Hash of a file's chunks."""
    return f"inf:{{file:{file_id}}}:data"


def files_key(tenant: str) -> str:
    """Sorted set of a tenant's files."""
    return f"inf:files:{tenant}"


def batch_key(batch_id: str) -> str:
    """Hash of a batch's description."""
    return f"inf:{{batch:{batch_id}}}:meta"


def batch_results_key(batch_id: str) -> str:
    """Hash of a batch's results by line."""
    return f"inf:{{batch:{batch_id}}}:results"


def batch_lease_key(batch_id: str) -> str:
    """The owner of a batch."""
    return f"inf:{{batch:{batch_id}}}:lease"


def batches_key(tenant: str) -> str:
    """Sorted set of a tenant's batches."""
    return f"inf:batches:{tenant}"


class Documents(Protocol):
    """Documents of one server. Every method may raise Disconnected and ServerRefused."""

    async def put(self, key: str, fields: Mapping[str, str | bytes], ttl_ms: int) -> None:
        """Set fields of a hash; the hash expires after `ttl_ms` from now."""

    async def get(self, key: str) -> dict[str, bytes]:
        """Return all fields of a hash; none of an unknown key."""

    async def values(self, key: str, names: Sequence[str]) -> list[bytes | None]:
        """Return the values of some fields of a hash."""

    async def names(self, key: str) -> list[str]:
        """Return the names of a hash's fields."""

    async def put_once(self, key: str, name: str, value: str | bytes) -> bool:
        """Set a field of a hash that has none of this name; return whether this call did."""

    async def increment(self, key: str, name: str) -> None:
        """Add one to an integer field of a hash."""

    async def expire(self, key: str, ttl_ms: int) -> None:
        """Have a key expire after `ttl_ms` from now."""

    async def shorten(self, key: str, ttl_ms: int) -> None:
        """Have a key expire after `ttl_ms` from now, unless it does before."""

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether it existed."""

    async def enlist(self, index: str, member: str, time_ms: int, keep_ms: int) -> None:
        """Add a member to an index, and remove those that are older by more than `keep_ms`."""

    async def listed(self, index: str) -> list[str]:
        """Return the members of an index, the newest first."""

    async def unlist(self, index: str, member: str) -> None:
        """Remove a member from an index."""

    async def hold(self, key: str, owner: str, ttl_ms: int) -> bool:
        """Take or renew a lease for `ttl_ms`; return False if another owner holds it."""

    async def release(self, key: str, owner: str) -> None:
        """End a lease of this owner."""
