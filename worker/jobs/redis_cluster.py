"""`Server` on Redis Cluster: each command goes to the master that has the slot of its key.

The map of slots is read with CLUSTER SLOTS at first, after a redirection (MOVED), and after a node
did not reply. A node that redirects a command has not executed it, so it is sent to the other node;
whether a command without a reply is repeated is decided by the callers, as for a single server.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from redis import exceptions
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot

from worker.jobs.redis_commands import key_of
from worker.jobs.redis_resp import Command
from worker.jobs.redis_server import Exchange, SingleServer
from worker.redis_url import Address

_MAX_REDIRECTIONS = 5
_MIN_AGE_S = 0.1
"""The map is not read again earlier."""
_MAP_TIMEOUT_S = 1.0
_ASKING: Command = ("ASKING",)


class Cluster:
    """The masters of a cluster. `open_node` creates the connections to one of them."""

    clustered = True

    def __init__(
        self,
        seeds: Sequence[Address],
        open_node: Callable[[Address], SingleServer],
        on_failover: Callable[[], None] | None = None,
    ) -> None:
        self._seeds = seeds
        self._on_failover = on_failover
        self._open_node = open_node
        self._nodes: dict[Address, SingleServer] = {}
        self._masters: list[Address | None] = [None] * SLOTS
        self._known: set[Address] = set()
        """Masters and replicas in the map."""
        self._replicated: set[Address] = set()
        """Masters with a replica."""
        self._unreachable: set[Address] = set()
        """Nodes that did not reply since the map was read."""
        self._outdated = True
        self._read_s = -_MIN_AGE_S
        self._reading = asyncio.Lock()

    async def exchange(self, commands: Sequence[Command], *, blocking: bool = False) -> list[Any]:
        replies: list[Any] = [None] * len(commands)
        targets: dict[int, Address | None] = dict.fromkeys(range(len(commands)))
        for _ in range(_MAX_REDIRECTIONS):
            await self._update_map()
            await self._exchange_round(commands, targets, replies, blocking)
            targets = {i: _ask_target(replies[i]) for i in targets if self._is_redirected(replies[i])}
            if not targets:
                break
        for i in targets:
            replies[i] = exceptions.ResponseError("TRYAGAIN the nodes of the cluster disagree about a slot")
        return _raise_if_unreachable(replies)

    async def _exchange_round(
        self, commands: Sequence[Command], targets: dict[int, Address | None], replies: list[Any], blocking: bool
    ) -> None:
        """Send the commands with the indices `targets`, to the address there after an ASK."""
        of_node: dict[Address, list[int]] = {}
        for i, ask_target in targets.items():
            master = ask_target or self._masters[_slot_of(commands[i])]
            if master is None:
                replies[i] = exceptions.ResponseError("CLUSTERDOWN hash slot not served")
            else:
                of_node.setdefault(master, []).append(i)

        async def send(address: Address, indices: list[int]) -> None:
            sent = [each for i in indices for each in ((_ASKING, commands[i]) if targets[i] else (commands[i],))]
            received = iter(await self._send(address, sent, blocking))
            for i in indices:
                if targets[i]:
                    next(received)
                replies[i] = next(received)

        if len(of_node) == 1:
            await send(*next(iter(of_node.items())))
        else:
            await asyncio.gather(*(send(address, indices) for address, indices in of_node.items()))

    async def exchange_at(self, key: str, commands: Sequence[Command]) -> list[Any]:
        """As of `Server`. If the node redirects one command, all are sent to the other node."""
        ask_target: Address | None = None
        for _ in range(_MAX_REDIRECTIONS):
            await self._update_map()
            master = ask_target or self._masters[_slot(key)]
            if master is None:
                raise exceptions.ResponseError("CLUSTERDOWN hash slot not served")
            sent = _with_asking(commands) if ask_target else [commands]
            replies = _raise_if_unreachable(await self._send(master, [*chain(*sent)], blocking=False))
            replies = [reply for reply, command in zip(replies, chain(*sent), strict=True) if command != _ASKING]
            redirections = [reply for reply in replies if self._is_redirected(reply)]
            if not redirections:
                return replies
            ask_target = _ask_target(redirections[0])
        raise exceptions.ResponseError("TRYAGAIN the nodes of the cluster disagree about a slot")

    def fails_over_alone(self, key: str) -> bool:
        return self._masters[_slot(key)] in self._replicated

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Exchange]:
        """A queue and a job are on different nodes, so no connection is kept."""
        yield self

    def suspect_idle(self) -> None:
        """Nothing: `_send` does so for the node that did not reply."""

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    def _node(self, address: Address) -> SingleServer:
        if address not in self._nodes:
            self._nodes[address] = self._open_node(address)
        return self._nodes[address]

    async def _send(self, address: Address, commands: Sequence[Command], blocking: bool) -> list[Any]:
        """The replies of one node; if it did not reply, the error for each command."""
        node = self._node(address)
        try:
            return await node.exchange(commands, blocking=blocking)
        except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
            node.suspect_idle()
            error.where = f"node {address}"  # type: ignore[union-attr]  # `translate` names it
            self._unreachable.add(address)
            self._outdated = True
            return [error] * len(commands)

    def _is_redirected(self, reply: Any) -> bool:
        """Whether another node has the slot. Corrects the map."""
        code, _, rest = str(reply).partition(" ") if isinstance(reply, exceptions.ResponseError) else ("", "", "")
        if code == "MOVED":
            slot, _, address = rest.partition(" ")
            self._masters[int(slot)] = _address(address)
        self._outdated = self._outdated or code in ("MOVED", "CLUSTERDOWN")
        return code in ("MOVED", "ASK")

    async def _update_map(self) -> None:
        """Read the map if it is outdated, from any node that replies.

        Raises the last error if no node replies and there is no map yet.
        """
        if not self._outdated:
            return
        async with self._reading:
            if not self._outdated or time.monotonic() - self._read_s < _MIN_AGE_S:
                return
            error: exceptions.RedisError | None = None
            for address in self._sources():
                try:
                    async with asyncio.timeout(_MAP_TIMEOUT_S):
                        (reply,) = await self._node(address).exchange([("CLUSTER", "SLOTS")])
                    if isinstance(reply, exceptions.ResponseError):
                        raise reply
                    await self._set_map(reply, address)
                    return
                except TimeoutError:
                    error = exceptions.TimeoutError("timeout reading from socket")
                except exceptions.RedisError as failed:
                    error = failed
                self._unreachable.add(address)
            self._read_s = time.monotonic()
            if error is not None and not self._known:
                raise error

    def _sources(self) -> Iterable[Address]:
        """Nodes in the order of the requests for the map: those that did not reply are last."""
        known = random.sample(sorted(self._known), len(self._known))
        return sorted(dict.fromkeys([*known, *self._seeds]), key=lambda address: address in self._unreachable)

    async def _set_map(self, reply: list[Any], source: Address) -> None:
        """Use a reply to CLUSTER SLOTS; close the connections to nodes without a slot."""
        masters: list[Address | None] = [None] * SLOTS
        self._known, self._replicated = set(), set()
        for first, last, *nodes in reply:
            addresses = [_endpoint(node, source) for node in nodes]
            masters[first : last + 1] = [addresses[0]] * (last - first + 1)
            self._known.update(addresses)
            if len(addresses) > 1:
                self._replicated.add(addresses[0])
        if any(self._masters) and masters != self._masters and self._on_failover:
            self._on_failover()
        self._masters = masters
        self._unreachable.clear()
        self._outdated, self._read_s = False, time.monotonic()
        gone = [address for address in self._nodes if address not in masters and address != source]
        await asyncio.gather(*(self._nodes.pop(address).close() for address in gone))


def _slot(key: str) -> int:
    return int(key_slot(key.encode()))


def _slot_of(command: Command) -> int:
    return _slot(key_of(command))


def _endpoint(node: list[Any], source: Address) -> Address:
    """The preferred endpoint of a node; without one, the host that the reply came from."""
    host = node[0].decode() if node[0] else ""
    return Address(source.host if host in ("", "?") else host, int(node[1]))


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(host, int(port))


def _ask_target(reply: Any) -> Address | None:
    """The node that an ASK names; None for MOVED, after which the map has it."""
    code, _, rest = str(reply).partition(" ")
    return _address(rest.partition(" ")[2]) if code == "ASK" else None


def _with_asking(commands: Sequence[Command]) -> list[Sequence[Command]]:
    """ASKING before each command; it holds for one command, or for a transaction."""
    if commands[0] == ("MULTI",):
        return [(_ASKING, *commands)]
    return [(_ASKING, command) for command in commands]


def _raise_if_unreachable(replies: list[Any]) -> list[Any]:
    """Raise the first reply if every reply is the error of a node that did not reply."""
    unreachable = exceptions.ConnectionError | exceptions.TimeoutError
    if replies and all(isinstance(reply, unreachable) for reply in replies):
        raise replies[0]
    return replies
