"""A flushed server, and the command line in this process against it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.jobs.harness import ServerHarness
from tests.jobs.servers import Server, running_server
from worker import cli

Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture(scope="module")
def module_server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(module_server: Server) -> Server:
    module_server.flush()
    return module_server


@pytest.fixture
def command(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setenv("WORKER_REDIS__URL", server.url)
        monkeypatch.setattr(sys, "argv", ["worker", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def prepare(server: Server, steps: Callable[[ServerHarness], Any]) -> None:
    """Run `steps` with a harness over the server."""

    async def go() -> None:
        harness = ServerHarness(server.url)
        await steps(harness)
        await harness.close()

    asyncio.run(go())
