"""Runs real coroutines as automata: from one call of the server to the next, restorable between.

Nodes, calls and replies are interned: equal ones have the same number. Every transition of an actor
is a function of (node, reply) and every one of the server of (node, call), so each is computed once
by the project's code and then looked up. Between two operations an actor is its pickled data; within
an operation it is that data, the operation's name, and the replies so far, which are repeated to
restore it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace, coroutine
from typing import Any, NamedTuple, Protocol
from unittest import mock

from tests.jobs.harness import lease_settings
from tests.jobs.memory_streams import Delivery, MemoryStreams, Stream
from worker.config import LeaseSection
from worker.jobs.keys import split_id
from worker.jobs.streams import Disconnected

NOW_MS = 1_000_000
"""Every clock is stopped."""
MAX_ATTEMPTS = 2
LEASE = lease_settings(lease_s=0.0, scan_s=0.0, max_attempts=MAX_ATTEMPTS, max_deliveries=3)
"""A lease of 0 s: any pending entry may be reclaimed at any time, as if its worker were paused."""


class Call(NamedTuple):
    """One call of `Streams`."""

    name: str
    args: tuple[Any, ...]


_NO_STEPS: dict[str, Any] = {"add": "1-0", "workers": {}, "time_ms": NOW_MS}
"""Replies of calls that neither read nor write what the protocol protects."""


class Lost(NamedTuple):
    """In place of a reply: the call was executed, and its reply lost."""


class Restarted(NamedTuple):
    """The server restarted: the connection is another one. No reply."""


LOST, RESTARTED = Lost(), Restarted()


@contextmanager
def stopped_clocks() -> Iterator[None]:
    """Stop the clocks of the protocol's modules and remove the pauses between retries."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, time=lambda: NOW_MS / 1000)
    with ExitStack() as patches:
        patches.enter_context(mock.patch("worker.jobs.streams.FIRST_DELAY_S", 0.0))
        for module in ("streams", "consumer", "served_models"):
            patches.enter_context(mock.patch(f"worker.jobs.{module}.time", clock))
        for module in ("transport", "lease", "protocol", "consumer"):
            patches.enter_context(mock.patch(f"worker.jobs.{module}.now_ms", return_value=NOW_MS))
        yield


@coroutine
def _wait_for_reply(call: Call) -> Generator[Call, Any, Any]:
    return (yield call)


class Connection:
    """`Streams` for an actor: each call suspends the actor's coroutine until the explorer replies."""

    documents: Any = None

    def __init__(self, reconnects: int) -> None:
        self.reconnects = reconnects
        self.waits_for_access = True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        async def call(*args: Any) -> Any:
            if name in _NO_STEPS:
                return _NO_STEPS[name]
            return await _wait_for_reply(Call(name, args))

        return call


class Program(Protocol):
    """The data of an actor between two operations. Its operations are its coroutine methods."""

    def choices(self) -> list[str]:
        """Names of the operations that it may begin."""

    def tidy(self) -> None:
        """Remove from the data what no later operation depends on."""


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, 5)
        self.fast = True  # no memo: equal data has equal bytes, however its parts are shared

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, LeaseSection):  # has a set, whose order differs between processes
            return "lease"
        return "connection" if isinstance(value, Connection) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, connection: Connection) -> None:
        super().__init__(io.BytesIO(data))
        self._connection = connection

    def persistent_load(self, name: Any) -> Any:
        return LEASE if name == "lease" else self._connection


def dump(value: Any) -> bytes:
    """Bytes that are equal for equal values."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


class Interned:
    """Numbers for values, by their bytes."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._keys: list[Any] = []

    def number(self, key: Any) -> int:
        """The number of a key, a new one for a new key."""
        number = self._numbers.setdefault(key, len(self._keys))
        if number == len(self._keys):
            self._keys.append(key)
        return number

    def __getitem__(self, number: int) -> Any:
        return self._keys[number]

    def __len__(self) -> int:
        return len(self._keys)


class Values(Interned):
    """Numbers for calls and replies."""

    def of(self, value: Any) -> int:
        """The number of a value."""
        return self.number(dump(value))

    def value(self, number: int) -> Any:
        """A new copy of the value."""
        return pickle.loads(self[number])


class ServerAutomaton:
    """The server: `execute` is `streams_class`, which must be `MemoryStreams` or a mutant of it."""

    def __init__(self, values: Values, streams_class: type[MemoryStreams] = MemoryStreams) -> None:
        self._values = values
        self._class = streams_class
        self.nodes = Interned()
        self.edges: dict[tuple[int, int], tuple[int, int]] = {}
        """(node, call) to (node, reply)."""
        self.reached_by: dict[int, tuple[int, int]] = {}
        """The first (node, call) that led to each node but the first."""
        self.first = self.nodes.number(_frozen(self._class(lambda: NOW_MS / 1000)))

    def streams(self, node: int) -> MemoryStreams:
        """A copy of the server in that state."""
        return _thawed(self.nodes[node], self._class)

    def execute(self, node: int, call: int) -> tuple[int, int]:
        """The state and the reply after the call."""
        edge = self.edges.get((node, call))
        if edge is None:
            streams, (name, args) = self.streams(node), self._values.value(call)
            reply = run(getattr(streams, name)(*args))
            after = self.nodes.number(_frozen(streams))
            edge = self.edges[node, call] = (after, self._values.of(reply))
            if after not in self.reached_by and after != self.first:
                self.reached_by[after] = (node, call)
        return edge


def run(work: Any) -> Any:
    """The result of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the call waits")


def _frozen(streams: MemoryStreams) -> bytes:
    """The server's state. Times of consumers and of expiry are left out: the clock is stopped."""
    frozen = []
    for key, stream in sorted(streams._streams.items()):
        entries = [(entry_id, sorted(fields.items())) for entry_id, fields in stream.entries.items()]
        pending = [(entry_id, d.consumer, d.at_ms, d.count) for entry_id, d in stream.pending_rows()]
        frozen.append((key, entries, stream.last_id, stream.delivered, pending))
    hashes = [(key, sorted(fields.items())) for key, fields in sorted(streams._hashes.items())]
    return dump((frozen, hashes, sorted(streams._expiry_ms)))


def _thawed(data: bytes, streams_class: type[MemoryStreams]) -> MemoryStreams:
    frozen, hashes, expiring = pickle.loads(data)
    streams = streams_class(lambda: NOW_MS / 1000)
    for key, entries, last_id, delivered, pending in frozen:
        rows = {entry_id: Delivery(consumer, at_ms, count) for entry_id, consumer, at_ms, count in pending}
        streams._streams[key] = Stream({i: dict(fields) for i, fields in entries}, last_id, delivered, rows)
        assert list(streams._streams[key].entries) == sorted(streams._streams[key].entries, key=split_id)
    streams._hashes = {key: dict(fields) for key, fields in hashes}
    streams._expiry_ms = dict.fromkeys(expiring, NOW_MS + 1_000_000)
    return streams


class ActorNode(NamedTuple):
    """A point between two calls: data, operation in progress ('' between two), its replies so far."""

    data: bytes
    reconnects: int
    operation: str
    replies: tuple[int, ...]


class ActorAutomaton:
    """Workers and orchestrators, whatever their number: all have their nodes here."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self.nodes = Interned()
        self.call: dict[int, int] = {}
        """The call that a node within an operation makes next."""
        self.operations: dict[int, list[str]] = {}
        """The operations that a node between two may begin."""
        self._steps: dict[tuple[int, Any], int] = {}

    def add(self, program: Program, reconnects: int = 0) -> int:
        """The node of an actor that has begun no operation."""
        program.tidy()
        node = self.nodes.number(ActorNode(dump(program), reconnects, "", ()))
        self.operations[node] = program.choices()
        return node

    def program(self, node: int) -> Any:
        """A copy of the actor's data, as it was before the operation in progress."""
        at: ActorNode = self.nodes[node]
        return _Unpickler(at.data, Connection(at.reconnects)).load()

    def begin(self, node: int, operation: str) -> int:
        """The node of the operation's first call."""
        return self._memoized(node, operation, self.nodes[node]._replace(operation=operation))

    def reply(self, node: int, reply: int) -> int:
        """The node after a reply."""
        at: ActorNode = self.nodes[node]
        return self._memoized(node, reply, at._replace(replies=(*at.replies, reply)))

    def restarted(self, node: int) -> int:
        """The node after a restart of the server, which this actor's next call will notice."""
        at: ActorNode = self.nodes[node]
        if at.operation:
            return self.reply(node, self._values.of(RESTARTED))
        return self.add(self.program(node), at.reconnects + 1)

    def _memoized(self, node: int, event: Any, to: ActorNode) -> int:
        step = self._steps.get((node, event))
        if step is None:
            step = self._steps[node, event] = self._run(to)
        return step

    def _run(self, to: ActorNode) -> int:
        """Run the operation from its beginning through all replies, up to its next call or its end."""
        connection = Connection(to.reconnects)
        program = _Unpickler(to.data, connection).load()
        work = getattr(program, to.operation)()
        try:
            call = _advance(work)
            for number in to.replies:
                reply = self._values.value(number)
                if isinstance(reply, Restarted):
                    connection.reconnects += 1
                elif isinstance(reply, Lost):
                    connection.reconnects += 1
                    call = _advance(work, error=Disconnected("the reply was lost"))
                else:
                    call = _advance(work, reply)
        except StopIteration:
            return self.add(program, connection.reconnects)
        node = self.nodes.number(to)
        self.call[node] = self._values.of(call)
        work.close()
        return node


def _advance(work: Any, reply: Any = None, error: Exception | None = None) -> Call:
    """The coroutine's next call. Raises StopIteration at its end."""
    call = work.throw(error) if error is not None else work.send(reply)
    while call is None:  # `asyncio.sleep(0)` between two retries
        call = work.send(None)
    assert isinstance(call, Call), f"the coroutine waits for {call}"
    return call
