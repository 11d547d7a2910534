"""Each script with each right that its user may lack: it is refused without an effect, or works.

Servers refuse a command of a script when the script reaches it, and keep what it wrote before.
`lua/rights.lua` has the rule. Redis 7.0, where found, names neither command nor key by itself.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pytest
from redis import Redis

from tests.jobs.servers import Server, running_server
from worker.errors import ServerRefused
from worker.jobs.keys import GROUP, dead_key, events_key, queue_key, state_key
from worker.jobs.redis_resp import Value
from worker.jobs.redis_scripts import load_scripts
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import AppendCall

QUEUE, DEAD = queue_key("default"), dead_key("default")
EVENTS, STATE = events_key("j"), state_key("j")
JOB = (EVENTS, STATE)
REDIS = shutil.which("redis-server")
NO_REDIS = pytest.mark.skipif(REDIS is None, reason="no redis-server on PATH")

QUEUED: list[Sequence[Value]] = [
    ("XADD", QUEUE, "1-1", "p", "j"),
    ("XADD", QUEUE, "1-2", "p", "other"),
    ("XGROUP", "CREATE", QUEUE, GROUP, 0),
]
DELIVERED = [*QUEUED, ("XREADGROUP", "GROUP", GROUP, "w", "COUNT", 1, "STREAMS", QUEUE, ">")]
ATTEMPT = ("epoch", 1, "worker", "w", "entry", "1-1", "taken_ms", 5, "tokens", 0, "tokens_before", 0, "barren", 0)
RUNNING: list[Sequence[Value]] = [
    ("XADD", EVENTS, "1-0", "type", "started", "p", "x"),
    ("HSET", STATE, "state", "running", *ATTEMPT),
]


@dataclass(frozen=True)
class Case:
    """A call of a script on a server with some state."""

    script: str
    keys: Sequence[str]
    args: Sequence[Value]
    before: Sequence[Sequence[Value]] = ()
    unused: Sequence[str] = ()
    """Commands of the script that such a call never needs."""


def take(expected: str, epoch: int, last_attempt: str) -> list[Value]:
    events = ("started", "opening", "", "cancelled", "poisoned")
    return ["1-1", "v", expected, epoch, 7, 60_000, 1, 20, 3, *events, last_attempt]


def append(kind: str, code: str) -> list[Value]:
    return ["1-0", 1, "w", 5, kind, 2, code, 9, 60_000, "", "1-1", "tokens", "a", "1-2", kind, "b"]


CASES = {
    "take a new job": Case("take", JOB, take("0-0", 1, " ")),
    "take over": Case("take", JOB, take("1-0", 2, "w 5"), RUNNING),
    "take a cancelled job": Case("take", JOB, take("1-0", 2, "w 5"), [*RUNNING, ("HSET", STATE, "cancel", 1)]),
    "append tokens": Case("append", JOB, append("running", ""), RUNNING),
    "append an end": Case("append", JOB, append("end", ""), RUNNING),
    "append an error": Case("append", JOB, append("error", "INTERNAL"), RUNNING),
    "cancel a waiting job": Case("cancel", JOB, ("0-0", 1, 7, 60_000, "error", "x")),
    "cancel a running job": Case("cancel", JOB, ("1-0", 2, 7, 60_000, "error", "x"), RUNNING),
    "state": Case("state", JOB, (), RUNNING),
    "renew": Case("renew", [QUEUE], (GROUP, "w", "1-1"), DELIVERED),
    "renew an acknowledged entry": Case(
        "renew", [QUEUE], (GROUP, "w", "1-1"), [*DELIVERED, ("XACK", QUEUE, GROUP, "1-1")]
    ),
    "renew a deleted entry": Case("renew", [QUEUE], (GROUP, "w", "1-1"), [*DELIVERED, ("XDEL", QUEUE, "1-1")]),
    "give back": Case("renew", [QUEUE], (GROUP, "w", "1-1", 5000, 0), DELIVERED),
    "settle": Case("settle", [QUEUE], (GROUP, "1-1"), DELIVERED, ("xpending", "xadd")),
    "dead-letter": Case("settle", [QUEUE, DEAD], (GROUP, "1-1", "p", "j"), DELIVERED),
    "reclaim": Case("reclaim", [QUEUE], (GROUP, "v", "1-1", "w", 1, 0), DELIVERED),
    "enqueue": Case("enqueue", [QUEUE], (10, "p", "j"), QUEUED),
    "remove consumers": Case(
        "remove_consumers", [QUEUE], (GROUP, 0), [*DELIVERED, ("XGROUP", "CREATECONSUMER", QUEUE, GROUP, "v")]
    ),
    "pending": Case("pending", [QUEUE], (GROUP, 10), DELIVERED),
    "find": Case("find", [QUEUE], ("j", "-", 10), QUEUED),
    "depth": Case("depth", [QUEUE], (GROUP, 1000), DELIVERED),
    "overview": Case("overview", [QUEUE], (GROUP, 1000, "0-0", 10, 1000), DELIVERED),
    "position": Case("position", [QUEUE], (GROUP, "other", 10), DELIVERED),
}


TIMED = ("enqueue", "pending", "depth", "overview")
"""Scripts whose replies depend on the server's clock."""


def commands_of(source: str) -> set[str]:
    """The commands of a script, as ACL rules name them."""
    calls = re.findall(r"redis\.p?call\(\s*'([A-Z]+)'(?:, '(STREAM|GROUPS|CONSUMERS|DELCONSUMER)')?", source)
    return {"|".join(filter(None, call)).lower() for call in calls}


def own_commands(script: str) -> set[str]:
    """Those of its file alone, without the functions that are prepended."""
    return commands_of((resources.files("worker.jobs") / "lua" / f"{script}.lua").read_text())


@pytest.fixture(scope="module", params=["valkey", pytest.param("redis", marks=NO_REDIS)])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with running_server(executable=REDIS if request.param == "redis" else None) as started:
        yield started


def contents(admin: Redis) -> dict[str, Any]:
    """All that the server keeps, without times and without the ids that its clock gave."""
    found: dict[str, Any] = {}
    for key in sorted(admin.keys("*")):
        value: Any = admin.hgetall(key) if admin.type(key) == "hash" else stream(admin, key)
        found[key] = (value, admin.pttl(key) > 0)
    return found


def stream(admin: Redis, key: str) -> Any:
    entries = [(entry_id if len(entry_id) < 8 else "new", fields) for entry_id, fields in admin.xrange(key)]
    groups = [
        (
            group["last-delivered-id"],
            [(row["message_id"], row["consumer"], row["times_delivered"]) for row in pending],
            sorted(consumer["name"] for consumer in admin.xinfo_consumers(key, group["name"])),
        )
        for group in admin.xinfo_groups(key)
        for pending in [admin.xpending_range(key, group["name"], "-", "+", 10)]
    ]
    return entries, groups


def test_every_script_has_a_case() -> None:
    assert {case.script for case in CASES.values()} == set(load_scripts())


@pytest.mark.parametrize("name", CASES)
async def test_a_missing_right_refuses_a_script_before_its_first_effect(server: Server, name: str) -> None:
    case = CASES[name]
    admin = Redis(port=server.port, protocol=2, decode_responses=True)
    streams = RedisStreams.from_url(server.url.replace("redis://", "redis://user:pw@"))

    def prepare(*rights: str) -> None:
        admin.flushall()
        admin.execute_command("ACL", "SETUSER", "user", "reset", "on", ">pw", "~*", "+@all", *rights)
        for command in case.before:
            admin.execute_command(*command)

    async def call() -> Any:
        return await streams._call(case.script, streams._run_script(case.script, case.keys, case.args))

    async def refusal() -> str | None:
        try:
            await call()
        except ServerRefused as error:
            return error.message
        return None

    prepare()
    before, reply, refused = contents(admin), await call(), set()
    after = contents(admin)
    for right in sorted(commands_of(load_scripts()[case.script].source)):
        prepare(f"-{right}")
        if message := await refusal():
            refused.add(right)
            key = "" if right == "time" else f" on ({'|'.join(map(re.escape, case.keys))})"
            assert re.search(f"refuses: the user lacks the right to run '{re.escape(right)}'{key};", message)
            assert contents(admin) == before, right
            admin.execute_command("ACL", "SETUSER", "user", "+@all")
            again = await call()
            assert again == reply or case.script in TIMED
        assert contents(admin) == after, right
    assert refused >= own_commands(case.script) - set(case.unused)
    await streams.close()
    admin.close()


@pytest.mark.parametrize(
    ("right", "words"),
    [
        ("evalsha", f"'evalsha' on {EVENTS} and {STATE};"),
        ("hset", f"'hset' on {STATE};"),
    ],
)
async def test_a_right_that_a_pipeline_lacks_is_named_with_its_key(server: Server, right: str, words: str) -> None:
    streams = RedisStreams.from_url(server.url.replace("redis://", "redis://user:pw@"))
    with Redis(port=server.port) as admin:
        admin.flushall()
        for script in load_scripts().values():
            admin.script_load(script.source)
        admin.execute_command("ACL", "SETUSER", "user", "reset", "on", ">pw", "~*", "+@all", f"-{right}")
    calls = [("j", AppendCall("1-0", 1, "w", 5, "running", 0, "", [], 0, 1000))] * 2
    with pytest.raises(ServerRefused, match=re.escape(f"lacks the right to run {words}")):
        await streams.append_many(calls)
    await streams.close()
