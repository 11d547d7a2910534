"""A real worker and gateway that have done some work, and their /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.gateways import GatewayProcess
from tests.jobs.harness import wait_until
from tests.jobs.servers import running_server
from tests.service.processes import Process

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "a prompt of more than sixteen tokens"}]}


@dataclass
class Processes:
    """A worker and a gateway; ports of their /metrics."""

    worker: int
    gateway: int
    redis_url: str

    def page(self, port: int) -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    @property
    def pages(self) -> list[str]:
        return [self.page(self.worker), self.page(self.gateway)]

    def samples(self) -> dict[str, set[frozenset[str]]]:
        """Names of labels by the name of each exported sample."""
        found: dict[str, set[frozenset[str]]] = {}
        for page in self.pages:
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    found.setdefault(sample.name, set()).add(frozenset(sample.labels))
        return found

    def make_traffic(self, requests: int = 4) -> None:
        """Requests that succeed, streamed and not, and one that fails."""
        asyncio.run(self._make_traffic(requests))

    async def _make_traffic(self, requests: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.gateway}", timeout=60) as http:

            async def served() -> bool:
                return bool((await http.get("/v1/models")).json()["data"])

            await wait_until(served, 30)
            for n in range(requests):
                body = CHAT | {"max_tokens": 4 + n, "stream": n % 2 == 1}
                assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
            assert (await http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 10**6})).status_code == 400


@pytest.fixture(scope="package")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """They have served requests, and their figures are at most 0.2 s old."""
    folder: Path = tmp_path_factory.mktemp("processes")
    often = {"WORKER_SERVICE__QUEUE_S": "0.2", "WORKER_SERVICE__VRAM_S": "0.2"}
    with running_server() as server:
        worker = Process(server.url, folder / "worker", "--echo", "--max-running", 4, **often)
        gateway = GatewayProcess(server.url, folder / "gateway")
        try:
            worker_port = int(worker.await_log("worker_starting")["http_port"])
            worker.await_log("worker_ready")
            started = Processes(worker_port, int(gateway.await_log("listening")["port"]), server.url)
            started.make_traffic()
            yield started
        finally:
            for process in (worker, gateway):
                process.popen.kill()
                process.wait()
