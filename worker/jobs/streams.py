"""The `Streams` interface: a Redis server as the protocol uses it, in atomic, repeatable calls.

Each method touches one hash slot, or splits its call by slot. `redis_streams.py` implements the
interface with `lua/`; `tests/jobs/memory_streams.py` does in plain Python and defines what each
script does.
`retry_until_connected` and `ServerClock` work over any implementation. Read `transport.py` next.
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, ParamSpec, Protocol, TypeVar

from worker.jobs.documents import Documents
from worker.jobs.events import EncodedEvent
from worker.jobs.keys import START, epoch_of

P = ParamSpec("P")
T = TypeVar("T")

FIRST_DELAY_S = 0.05
MAX_DELAY_S = 1.0
BUSY_S = 5.0
"""Time for which a client's command is repeated while the server refuses it for now."""
STATUS_TTL_MS = 15_000
"""A worker without a heartbeat for this long is no longer listed."""
FIGURES = frozenset({"depth", "overview"})
"""Calls for metrics and views."""
REFUSAL_S = 10.0
"""A call that was refused and is not repeated counts as failing for this long."""

Fields = Mapping[str, bytes]
Record = tuple[str, Fields]
"""One entry of any stream: its id and fields."""
Ownership = Literal["held", "lost", "deleted"]
"""Of a queue entry: pending for this consumer; not pending for it; no longer in the queue."""


class Disconnected(ConnectionError):
    """The server is unreachable or refuses for now, or its reply was lost: a repetition may help.

    `reply` is the first word of a temporary refusal, such as READONLY, LOADING, MISCONF, BUSY or
    NOREPLICAS: that call had no effect. If it is empty, the call may have taken effect.
    """

    def __init__(self, message: str, reply: str = "") -> None:
        super().__init__(message)
        self.reply = reply
        self.is_local = False
        """No login was sent: the password file cannot be read, or is empty."""
        self.node = ""
        """The node of a cluster that gave no reply; others may be reachable."""
        self.job_id: str | None = None
        """The id of the job whose submission was interrupted."""

    @property
    def code(self) -> str:
        """The stable code: REDIS_BUSY for a temporary refusal, else REDIS_UNREACHABLE."""
        return "REDIS_BUSY" if self.reply else "REDIS_UNREACHABLE"


@dataclass(frozen=True, slots=True)
class Entry:
    """A queue entry delivered to a consumer. `fields` is empty if the entry was deleted since."""

    id: str
    fields: Fields
    deliveries: int


@dataclass(frozen=True, slots=True)
class TakeCall:
    """Arguments of `take`: write `opening` as `<epoch>-0` if the stream's last id is `expected`,
    and the job's last attempt `last_attempt`.

    Instead of `opening`, `cancelled` is written if a cancel was requested, and `poisoned` after
    more than `max_deliveries` deliveries or `max_attempts` attempts without a new token or release.
    """

    entry_id: str
    worker: str
    expected: str
    epoch: int
    last_attempt: str
    """`JobState.attempt` as the caller has read it. After lost writes ids are used again."""
    opening: EncodedEvent
    opening_code: str
    """The error code if `opening` is a terminal error, else empty."""
    cancelled: EncodedEvent
    poisoned: EncodedEvent
    deliveries: int
    max_deliveries: int
    max_attempts: int
    now_ms: int
    """With `worker` it identifies the attempt: no two calls of a worker have the same."""
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class TakeReply:
    """Result of `take`.

    - TAKEN: the caller owns the epoch.
    - RETRY: last id, epoch or last attempt differ from the caller's; nothing was written.
    - DUPLICATE: the job belongs to another queue entry.
    - CLOSED: a terminal error with this `code` was written.
    - OVER: the stream had its terminal event before. `code` is its error code and `entry_id` the
      queue entry that the job was bound to; each may be empty.
    """

    outcome: str
    code: str = ""
    entry_id: str = ""


class AppendCall(NamedTuple):
    """Arguments of `append`: write all `events` if the stream's last id is `expected`."""

    expected: str
    epoch: int
    worker: str
    taken_ms: int
    """`now_ms` of the attempt's `TakeCall`: distinguishes it from the worker's other attempts."""
    state: str
    """`running`, `handed_back`, or the type of the terminal event."""
    tokens: int
    """Number of tokens published after this batch."""
    code: str
    """Error code, or empty."""
    events: Sequence[tuple[str, EncodedEvent]]
    """Each with its id, `<epoch>-<seq>`."""
    now_ms: int
    ttl_ms: int
    base_attempt: str = ""
    """If the epoch's first event is written again: what `JobState.attempt` must be before it."""


@dataclass(frozen=True, slots=True)
class CancelCall:
    """Arguments of `cancel`: flag a running job, end any other with `event` as `<epoch>-0`."""

    expected: str
    epoch: int
    event: EncodedEvent
    now_ms: int
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class PendingEntry:
    """A delivered, unacknowledged queue entry and its consumer, as XPENDING lists it."""

    entry_id: str
    consumer: str
    idle_ms: int
    """0 as well while `delivered_ms` is in the future, because the server's clock went back."""
    deliveries: int
    delivered_ms: int
    """When it was delivered or renewed last, by the server's clock; now if `idle_ms` is 0."""


@dataclass(frozen=True, slots=True)
class QueueOverview:
    """A queue at one time."""

    now_ms: int
    """The server's clock."""
    length: int
    """Entries, waiting and running."""
    delivered: str
    """Id of the last delivered entry: those above it wait."""
    pending_count: int
    running: int
    """Pending entries that were renewed within a lease, as in `QueueDepth`."""
    pending: Sequence[PendingEntry]
    first_waiting: str
    """Id of the oldest waiting entry; empty if none waits."""
    entries: Sequence[tuple[str, bytes]]
    """Id and payload of entries above the cursor of the call."""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's state hash and the last id of its stream; empty for an unknown job."""

    last_id: str = START
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def attempt(self) -> str:
        """The worker and the time of the last attempt, which identify it; a space if none began."""
        return f"{self.fields.get('worker', '')} {self.fields.get('taken_ms', '')}"

    @property
    def next_epoch(self) -> int:
        """One above the epochs of the hash and of the stream."""
        return max(int(self.fields.get("epoch", 0)), epoch_of(self.last_id)) + 1


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Jobs of a queue at one time."""

    waiting: int
    """No worker has them: never claimed, given back, or not renewed for a lease."""
    running: int
    oldest_wait_ms: int
    """Since the submission of the oldest waiting job; 0 if none waits."""
    dead_letters: int


class Contact:
    """Reports once when calls begin to fail, and once when they succeed again; by default logs it.

    The first `is_local` failure is reported too: before it, only the lost connection was.

    A server may refuse some calls and serve others: a refused call must itself succeed, or not be
    repeated for `REFUSAL_S`, before the server counts as back. A cluster counts as back when no
    node has failed for `REFUSAL_S`. Without `from_start`, failures before the first success are not
    reported.
    """

    def __init__(
        self,
        on_lost: Callable[[str], None] | None = None,
        on_back: Callable[[float], None] | None = None,
        *,
        from_start: bool = True,
    ) -> None:
        log = logging.getLogger(__name__)
        self.last_error: Disconnected | None = None
        self._on_lost = on_lost or (lambda reason: log.warning("%s", reason))
        self._on_back = on_back or (lambda seconds: log.warning("connected again after %.1f s", seconds))
        self._reporting = from_start
        self._lost_s: float | None = None
        self._failed_s = 0.0
        self._failing: dict[str, float] = {}
        """Times of the last failure, by refused call and by node without a reply (cluster)."""
        self._refusals: dict[str, tuple[float, float]] = {}
        """By call, the times of the first and the last refusal since it last succeeded."""
        self._local_reported = False

    @property
    def refused_for_s(self) -> float:
        """Seconds for which the server has refused a call, such as writes if it is full, else 0.

        A call counts until it succeeds, or has not been refused for `REFUSAL_S`. Figures for
        metrics do not count: no job waits for them.
        """
        now_s = time.monotonic()
        refused = (times for call, times in self._refusals.items() if call not in FIGURES)
        return max((now_s - first_s for first_s, last_s in refused if now_s - last_s <= REFUSAL_S), default=0.0)

    def failed(self, call: str, error: Disconnected) -> None:
        """Record the failure of a call by that name."""
        self.last_error, self._failed_s = error, time.monotonic()
        if error.reply or error.node:
            self._failing[error.node or call] = self._failed_s
        if error.reply:
            first_s, last_s = self._refusals.get(call, (self._failed_s, self._failed_s))
            self._refusals[call] = (first_s if self._failed_s - last_s <= REFUSAL_S else self._failed_s, self._failed_s)
        if not self._reporting:
            return
        if self._lost_s is None or (error.is_local and not self._local_reported):
            self._on_lost(str(error))
            self._local_reported = error.is_local
        self._lost_s = self._failed_s if self._lost_s is None else self._lost_s

    def succeeded(self, call: str, began_s: float) -> None:
        """Record the success of a call that began at the monotonic time `began_s`."""
        self._reporting = True
        if call in self._refusals and began_s >= self._refusals[call][1]:
            del self._refusals[call]
        if self._lost_s is None or began_s < self._failed_s:
            return
        self._failing.pop(call, None)
        if all(began_s - failed_s > REFUSAL_S for failed_s in self._failing.values()):
            self._on_back(time.monotonic() - self._lost_s)
            self._lost_s = None
            self._failing.clear()
            self._local_reported = False


class Streams(Protocol):
    """A connection to a server of streams; times are in ms.

    Every method may raise Disconnected, and ServerRefused if a repetition would not help.
    """

    reconnects: int
    """Number of reconnections so far. Each may have lost replies."""
    waits_for_access: bool
    """Whether refused access (password, rights, TLS) raises Disconnected rather than ServerRefused.

    False at first. A running worker sets it, since an operator may be changing a password.
    """
    max_separate_reads: int
    """Number of readers that best wait in a `read` of their own; others share `read_many`.

    0 where one call can wait for any streams. A cluster refuses streams of several slots in one.
    """
    documents: Documents
    """What the gateway stores on the same server."""
    contact: Contact
    """Whether calls succeed."""

    async def open_queue(self, queue: str) -> None:
        """Create the stream and its consumer group, from id 0, unless they exist."""

    async def enqueue(self, queue: str, fields: Fields, bound: int) -> str | None:
        """Add an entry and return its id, or None if the queue holds `bound` entries.

        Repeating it adds a second entry of the job, which `take` refuses as a duplicate.
        """

    async def read_new(self, queues: Sequence[str], consumer: str, block_ms: int) -> dict[str, Entry]:
        """Return the next undelivered entry of each queue, waiting up to `block_ms` for the first.

        With 0 the call does not wait.
        """

    async def read_own(self, queue: str, consumer: str, above: str) -> Entry | None:
        """Return the consumer's next pending entry, without counting a delivery."""

    async def reclaim(self, queue: str, consumer: str, row: PendingEntry) -> Entry | None:
        """Claim an entry and count a delivery, unless it has changed since `row` was read."""

    async def renew(self, queue: str, consumer: str, entry_id: str) -> Ownership:
        """Reset the entry's idle time if it is pending for `consumer`.

        An entry that an operator acknowledged, which no consumer has pending, is pending again.
        """

    async def renew_many(
        self, consumer: str, calls: Sequence[tuple[str, str, str | None]]
    ) -> list[tuple[Ownership, bool] | None]:
        """Make several `renew` calls in one round trip: each with queue, entry and job, if known.

        Returns for each the ownership, and whether a cancel of the job was requested; None for one
        that failed, whose cause `renew` or `job_state` reports.
        """

    async def give_back(self, queue: str, consumer: str, entry_id: str, idle_ms: int, deliveries: int) -> bool:
        """Set idle time and delivery count of the entry, under the same condition as `renew`."""

    async def settle(self, queue: str, entry_id: str, dead: Fields | None, job_id: str | None = None) -> bool:
        """Acknowledge and delete the entry, and add `dead`, if given, to the dead letters.

        Only the first call adds them. The entry is left if the server has lost its delivery, and
        repeats it. With a `job_id` the call returns False and does nothing unless this job is over
        or bound to another entry: the server has lost the last event of a job that had ended.
        """

    async def remove_consumers(self, queue: str, name: str | None, min_idle_ms: int) -> int:
        """Delete idle consumers (or only `name`) without pending entries; return how many."""

    async def pending(self, queue: str, count: int) -> list[PendingEntry]:
        """Return the first `count` pending entries."""

    async def job_state(self, job_id: str) -> JobState:
        """Return the job's state and the last id of its stream, read atomically."""

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        """Begin an epoch of the job."""

    async def append(self, job_id: str, call: AppendCall) -> str:
        """Return the stream's last id; START if it is gone or another worker has the epoch."""

    async def append_many(self, calls: Sequence[tuple[str, AppendCall]]) -> list[str | None]:
        """Make several `append` calls in one round trip, each atomic.

        Returns their results; None for one that failed, whose cause `append` reports.
        """

    async def cancel(self, job_id: str, call: CancelCall) -> str:
        """Return CANCELLED (ended as such), REQUESTED (running), OVER (ended before) or RETRY."""

    async def expire_job(self, job_id: str, ttl_ms: int) -> None:
        """Shorten the time to live of a job's two keys to `ttl_ms`; never lengthen it."""

    async def check_writes(self) -> None:
        """Raise Disconnected with `reply` if the server refuses writes for now. Writes nothing."""

    async def add(self, key: str, fields: Fields, keep: int, ttl_ms: int | None) -> str:
        """Append to a stream trimmed to about `keep` entries. Not for job or queue streams."""

    async def read(self, key: str, after: str, block_ms: int, count: int = 100) -> list[Record]:
        """Return entries above `after`, waiting up to `block_ms` for the first."""

    async def read_many(self, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Record]]:
        """Return entries of several streams, by key, above the id given for each.

        Waits up to `block_ms` until one stream has an entry; up to `count` entries of each stream.
        """

    async def find(self, queue: str, job_id: str, first: str, count: int) -> tuple[str | None, list[Record]]:
        """Search `count` entries of the queue from the id `first` for one that may have the job id.

        Returns the id to continue the search at, None at the queue's end, and the entries whose
        payload contains the id's text.
        """

    async def position(self, queue: str, text: str, count: int) -> tuple[int, int] | None:
        """Return the place of the first entry with `text` in its payload among the waiting ones.

        Places count from 1; the second number is that of all waiting entries. None if none of the
        queue's first `count` entries contains the text, or if that entry runs.
        """

    async def depth(self, queue: str, lease_ms: int) -> QueueDepth:
        """Count the jobs of a queue. One that was not renewed for `lease_ms` has no worker."""

    async def overview(self, queue: str, lease_ms: int, above: str | None, limit: int) -> QueueOverview:
        """Return the queue's state, with up to `limit` of the entries above an id, if given.

        An entry that was not renewed for `lease_ms` waits, as in `depth`.
        """

    async def length(self, key: str) -> int:
        """Return the number of entries of a stream."""

    async def range(self, key: str, first: str, last: str, count: int) -> list[Record]:
        """Return entries from `first` to `last`, inclusive; `-` and `+` are the ends."""

    async def last_id(self, key: str) -> str:
        """Return the last id of the stream, whether or not its entry still exists."""

    async def delete(self, key: str, entry_id: str) -> bool:
        """Delete one entry."""

    async def put_status(self, worker: str, status: Mapping[str, str], ttl_ms: int) -> None:
        """Register the worker and write its status hash, which expires after `ttl_ms`."""

    async def drop_status(self, worker: str) -> None:
        """Unregister the worker."""

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """Return the status of each registered, live worker by name."""

    async def time_ms(self) -> int:
        """Return the server's clock, ms since 1970."""

    async def close(self) -> None:
        """Close the connections."""


async def retry_until_connected(call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Repeat the call until it does not raise Disconnected, with exponential backoff and jitter."""
    delay_s = FIRST_DELAY_S
    while True:
        try:
            return await call(*args, **kwargs)
        except Disconnected:
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(MAX_DELAY_S, 2 * delay_s)


async def repeat_briefly(call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Make a call that may be repeated: again once after a lost reply, for BUSY_S if refused."""
    delay_s, lost, until_s = FIRST_DELAY_S, False, time.monotonic() + BUSY_S
    while True:
        try:
            return await call(*args, **kwargs)
        except Disconnected as error:
            if lost if not error.reply else time.monotonic() + delay_s > until_s:
                raise
            if not error.reply:
                lost = True
                continue
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
        delay_s = min(MAX_DELAY_S, 2 * delay_s)


class ServerClock:
    """The server's clock: a TIME reply, extrapolated for `VALID_S` or until a reconnection."""

    VALID_S = 10.0
    """Two clocks drift apart by less than 1 ms in this time."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._reconnects = streams.reconnects
        self._read_s = -math.inf
        self._offset_ms = 0.0

    async def now_ms(self) -> int:
        """Milliseconds since 1970, by the server."""
        if self._age_s > self.VALID_S:
            self._set(await retry_until_connected(self._streams.time_ms))
        return int(time.monotonic() * 1000 + self._offset_ms)

    async def refresh(self) -> None:
        """Read the clock if half of `VALID_S` has passed and the server is reachable."""
        if self._age_s > self.VALID_S / 2:
            with contextlib.suppress(Disconnected):
                self._set(await self._streams.time_ms())

    @property
    def _age_s(self) -> float:
        same_connection = self._reconnects == self._streams.reconnects  # another may be to another server
        return time.monotonic() - self._read_s if same_connection else math.inf

    def _set(self, server_ms: int) -> None:
        self._reconnects, self._read_s = self._streams.reconnects, time.monotonic()
        self._offset_ms = server_ms - self._read_s * 1000
