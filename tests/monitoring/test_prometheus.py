"""Rules, alert cases, scrape configuration and every query on a real Prometheus server.

Debian's package `prometheus` brings the programs; without them these tests are skipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from tests.jobs.servers import PR_SET_PDEATHSIG, free_port
from tests.monitoring.conftest import Processes
from tests.monitoring.queries import ROOT, RULES, alerts, panel_queries

CONFIG = ROOT / "deploy/prometheus/prometheus.yaml"


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on PATH: `apt-get install prometheus` brings it")
    return found


def passes(*command: object, given: str = "") -> str:
    done = subprocess.run([*map(str, command)], input=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rules_and_the_scrape_configuration_are_valid() -> None:
    passes(program("promtool"), "check", "rules", RULES)
    passes(program("promtool"), "check", "config", CONFIG)


def test_every_alert_fires_and_clears() -> None:
    passes(program("promtool"), "test", "rules", ROOT / "tests/monitoring/rules_test.yaml")


@pytest.mark.parametrize("process", ["worker", "gateway"])
def test_the_pages_follow_the_format_and_the_naming_rules_of_prometheus(processes: Processes, process: str) -> None:
    page = processes.page(getattr(processes, process))
    assert passes(program("promtool"), "check", "metrics", given=page) == ""


def end_with_this_process() -> None:
    """Run in the child: it is killed if the tests are."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Prometheus:
    """A server on a loopback port."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> Any:
        with urlopen(f"{self._url}{path}?{urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        return self.get("/api/v1/query", query=query)["result"]

    def wait_until(self, query: str) -> None:
        """Wait until the query has a result."""
        deadline = time.monotonic() + 60
        found: list[dict[str, Any]] = []
        while not found:
            with contextlib.suppress(OSError):  # it is starting
                found = self.query(query)
            assert time.monotonic() < deadline, f"no result: {query}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def prometheus(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A server that scrapes the two processes with deploy/prometheus, every second instead of 15 s."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
    targets = {"worker": processes.worker, "gateway": processes.gateway}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{targets[job['job_name']]}"]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(RULES, folder)
    command = [program("prometheus"), f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder}"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (folder / "log").open("wb") as log:
        options: dict[str, Any] = {"stdout": log, "stderr": log, "preexec_fn": end_with_this_process}
        process = subprocess.Popen(command, **options)
    server = Prometheus(port)
    try:
        server.wait_until("count(up == 1) == 2")
        yield server
    finally:
        process.kill()
        process.wait()


def test_every_query_of_the_dashboard_has_data_after_traffic(processes: Processes, prometheus: Prometheus) -> None:
    prometheus.wait_until("worker_requests_total")
    processes.make_traffic()
    prometheus.wait_until('rate(worker_request_success_total{finish_reason="length"}[1m]) > 0')
    prometheus.wait_until('rate(gateway_requests_total{route="/v1/chat/completions",status="200"}[1m]) > 0')
    queries = panel_queries()
    empty = {place for place, query in queries.items() if not prometheus.query(query)}
    assert empty == set()
    values = {place: [float(x["value"][1]) for x in prometheus.query(query)] for place, query in queries.items()}
    assert values["Workers that take jobs: __auto"] == [1]
    assert max(values["Tokens per second: generated {{model}}"]) > 0
    assert 0 < values["Time to first token, from submission: p50 {{model}}"][0] < 60
    assert values["Share of 5xx: 5xx"] == [0]


def test_every_rule_is_evaluated_and_no_alert_fires_without_a_cause(prometheus: Prometheus) -> None:
    prometheus.wait_until("worker_info")
    deadline, rules = time.monotonic() + 60, [{"health": "unknown"}]
    while any(rule["health"] == "unknown" for rule in rules) and time.monotonic() < deadline:
        time.sleep(0.2)
        rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert {(rule["name"], rule["health"]) for rule in rules} == {(rule["alert"], "ok") for rule in alerts()}
    assert [alert for alert in prometheus.get("/api/v1/alerts")["alerts"] if alert["state"] == "firing"] == []
