"""User names and passwords: read anew from files, and in no log, message or representation."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.jobs.cluster import ClusterServer
from tests.jobs.sentinels import SERVICE
from tests.jobs.servers import Server, free_port, running_server
from worker.errors import ServerRefused
from worker.jobs.client import Client, SyncClient
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Contact, Disconnected
from worker.redis_url import RedisUrl

SECRETS = ("us3r", "s3cret")


def shown_by(thing: Any) -> str:
    """Every representation of an object of this project or of redis-py, and of those that it holds."""
    seen: set[int] = set()
    found: list[str] = []
    todo = [thing]
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, type):
            continue
        seen.add(id(each))
        if type(each).__module__.startswith(("worker.", "redis.")):
            found.append(f"{each!r} {each!s}")
            todo += gc.get_referents(each)
        elif isinstance(each, dict | list | tuple | set | MethodType | FunctionType | CellType):
            todo += gc.get_referents(each) if not isinstance(each, FunctionType) else (each.__closure__ or ())
    assert len(found) > 5, "the objects were not visited"
    return " ".join(found)


def assert_without_secrets(*texts: str) -> None:
    for text in texts:
        for secret in SECRETS:
            assert secret not in text, text


@pytest.mark.parametrize("kind", ["server", "cluster", "sentinel"])
async def test_no_representation_message_or_log_holds_a_secret(
    kind: str, server: Server, cluster: ClusterServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused logins and unreachable servers, in a client and in the objects that it is made of."""
    caplog.set_level(logging.DEBUG)
    urls = {
        "server": [server.url, f"redis://127.0.0.1:{free_port()}"],
        "cluster": [cluster.url, f"redis+cluster://127.0.0.1:{free_port()}"],
        "sentinel": [
            f"redis+sentinel://127.0.0.1:{server.port}/main",
            f"redis+sentinel://127.0.0.1:{free_port()}/main",
        ],
    }[kind]
    for url in urls:
        login = url.replace("://", "://us3r:s3cret@")
        if kind == "sentinel":
            login += "?sentinel_username=us3r&sentinel_password=s3cret"
        client = Client.from_url(login)
        with pytest.raises((ServerRefused, Disconnected)) as caught:
            await client.workers()
        error = caught.value
        assert_without_secrets(str(error), repr(error), "".join(traceback.format_exception(error)))
        parsed = RedisUrl.parse(login)
        streams = client._streams
        assert_without_secrets(shown_by(client), shown_by(streams), str(parsed), repr(parsed))
        with SyncClient.from_url(login) as sync:
            assert_without_secrets(shown_by(sync))
        await client.close()
    assert_without_secrets(caplog.text)


async def test_a_rotated_password_is_read_by_the_next_connection(tmp_path: Path) -> None:
    """Without a restart, and while a call waits for the right one."""
    path = tmp_path / "password"
    path.write_text("first\n")
    with running_server("--requirepass", "first") as server:
        streams = RedisStreams.from_url(f"{server.url}?password_file={path}")
        streams.waits_for_access = True
        await streams.open_queue("default")
        async with Redis(port=server.port, password="first") as admin:
            await admin.config_set("requirepass", "second")
            await admin.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(Disconnected, match="WRONGPASS"):
            await streams.length("inf:{q:default}:jobs")
        path.unlink()
        with pytest.raises(Disconnected, match=f"password_file: cannot read {path}: no such file or directory"):
            await streams.length("inf:{q:default}:jobs")
        path.write_text("second\n")
        assert await streams.length("inf:{q:default}:jobs") == 0
        await streams.close()


async def test_a_password_file_that_is_emptied_is_named_after_the_connection_was_closed(tmp_path: Path) -> None:
    path, lines = tmp_path / "password", list[str]()
    path.write_text("first\n")
    with running_server("--requirepass", "first") as server:
        contact = Contact(lines.append, lambda _: lines.append("back"))
        streams = RedisStreams.from_url(f"{server.url}?password_file={path}", contact)
        streams.waits_for_access = True
        reading = asyncio.create_task(streams.read("inf:control", "0-0", 4000))
        async with Redis(port=server.port, password="first") as admin:
            while not (await admin.info("clients"))["blocked_clients"]:
                await asyncio.sleep(0.01)
            path.write_text("")
            await admin.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(Disconnected):
            await reading
        for _ in range(3):
            with pytest.raises(Disconnected, match="is empty"):
                await streams.length("inf:control")
        address = server.url
        assert lines == [
            f"cannot reach {address} (connection closed by server)",
            f"cannot reach {address} (password_file: {path} is empty; expected the password)",
        ]
        path.write_text("wrong\n")
        for _ in range(2):
            with pytest.raises(Disconnected, match="WRONGPASS"):
                await streams.length("inf:control")
        assert len(lines) == 2
        path.write_text("first\n")
        assert await streams.length("inf:control") == 0
        await streams.close()


async def test_sentinels_have_a_login_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "sentinel"
    folder.mkdir()
    with running_server("--requirepass", "of-the-server") as server:
        config = folder / "sentinel.conf"
        config.write_text(f"sentinel monitor {SERVICE} 127.0.0.1 {server.port} 1\nrequirepass of-the-sentinel\n")
        sentinel = Server(str(folder), "--sentinel", config=config)
        sentinel.start()
        try:
            url = f"redis+sentinel://:of-the-server@127.0.0.1:{sentinel.port}/{SERVICE}"
            (tmp_path / "p").write_text("of-the-sentinel")
            for option in ("sentinel_password=of-the-sentinel", f"sentinel_password_file={tmp_path}/p"):
                streams = RedisStreams.from_url(f"{url}?{option}")
                assert await streams.time_ms() > 0
                await streams.close()
            streams = RedisStreams.from_url(url)
            with pytest.raises(ServerRefused, match="it requires a password"):
                await streams.time_ms()
            await streams.close()
        finally:
            sentinel.stop()
