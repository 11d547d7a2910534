"""One trace from the gateway's request to the worker's engine, and nothing at all without an endpoint."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.gateway.gateways import Gateway, gateway
from tests.jobs.harness import Harness, ServerHarness, wait_until
from tests.jobs.servers import Server
from tests.service.models import SharedModel
from tests.service.processes import workers
from tests.service.serving import LONG_LEASE, Worker, run_job, serving
from tests.tracing.receiver import Receiver, attributes_of, receiver
from worker import tracing
from worker.config import LogSection, TracingSection, load_settings
from worker.echo import load_echo
from worker.errors import ConfigInvalid
from worker.jobs.client import Client
from worker.telemetry import open_log
from worker.tracing import open_tracing
from worker.tracing.otlp import Tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "crimson elephant"


@contextlib.contextmanager
def opened(url: str, service: str = "worker", output: io.StringIO | None = None):
    log = open_log(LogSection(format="json"), service, output or io.StringIO())
    found = open_tracing(TracingSection(endpoint=url), service, f"{service}-1", log)
    assert found is not None
    try:
        yield found
    finally:
        found.close()


@contextlib.asynccontextmanager
async def traced_worker(
    harness: Harness, url: str, model: Any = None, name: str = "w1", **options: Any
) -> AsyncIterator[Worker]:
    """A worker, of the model echo by default, whose spans have been sent at the end."""
    with opened(url) as found:
        model = model or SharedModel.echo().fresh()
        async with serving(harness, model, name=name, lease=LONG_LEASE, tracing=found, **options) as worker:
            yield worker


def parent_of(span: Span) -> str:
    return span.parent_span_id.hex()


def assert_within(inner: Span, outer: Span) -> None:
    assert outer.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano
    assert inner.end_time_unix_nano <= outer.end_time_unix_nano


async def test_a_request_and_its_job_are_one_trace_with_the_right_parents(
    server: Server, endpoint: Receiver, model: Callable[..., SharedModel]
) -> None:
    harness = ServerHarness(server.url)
    with opened(endpoint.url, "gateway") as of_gateway:
        async with (
            traced_worker(harness, endpoint.url, model().fresh(name="tiny")),
            gateway(harness, tracing=of_gateway) as running,
        ):
            await running.wait_for_model("tiny")
            body = {"model": "tiny", "prompt": SECRET, "max_tokens": 4, "temperature": 0.5, "ignore_eos": True}
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            response = await running.http().post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text
    await harness.close()
    request, job = endpoint.one("POST /v1/completions"), endpoint.one("text_completion tiny")
    wait, attempt = endpoint.one("queue wait"), endpoint.one("attempt")
    prefill, decode = endpoint.one("prefill"), endpoint.one("decode")
    assert {span.trace_id.hex() for span in endpoint.spans} == {TRACE}
    assert [parent_of(request), parent_of(job)] == [PARENT, request.span_id.hex()]
    assert parent_of(wait) == parent_of(attempt) == job.span_id.hex()
    assert parent_of(prefill) == parent_of(decode) == attempt.span_id.hex()
    assert (request.kind, job.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CONSUMER)
    for inner, outer in ((wait, job), (attempt, job), (prefill, attempt), (decode, attempt)):
        assert_within(inner, outer)
    assert wait.end_time_unix_nano == attempt.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert sorted(set(endpoint.services)) == ["gateway", "worker"]

    found = attributes_of(job)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "tiny"
    assert found["gen_ai.usage.output_tokens"] == 4
    assert found["gen_ai.usage.input_tokens"] == response.json()["usage"]["prompt_tokens"]
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.max_tokens"]) == (0.5, 4)
    assert found["gen_ai.response.id"] == attributes_of(request)["gen_ai.response.id"] == response.json()["id"]
    assert attributes_of(request)["http.response.status_code"] == 200
    assert not any(span.status.code for span in endpoint.spans)
    answer = response.json()["choices"][0]["text"].encode()
    for body in endpoint.bodies:
        assert SECRET.encode() not in body
        assert len(answer) < 4 or answer not in body


async def test_metrics_have_the_boundaries_of_the_conventions(fake: Harness, endpoint: Receiver) -> None:
    async with traced_worker(fake, endpoint.url):
        await run_job(fake.client(), prompt="a b c", max_tokens=3)
    duration, first, each = (
        endpoint.histograms[f"gen_ai.server.{name}"]
        for name in ("request.duration", "time_to_first_token", "time_per_output_token")
    )
    assert [len(points) for points in (duration, first, each)] == [1, 1, 1]
    assert [points[0].count for points in (duration, first, each)] == [1, 1, 1]
    assert list(duration[0].explicit_bounds) == [0.01 * 2**n for n in range(14)]
    assert list(first[0].explicit_bounds) == [
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
    ]
    assert list(each[0].explicit_bounds) == [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
    assert attributes_of(duration[0])["gen_ai.request.model"] == "echo"
    assert "error.type" not in attributes_of(duration[0])


async def test_an_invalid_traceparent_begins_a_new_trace(fake: Harness, endpoint: Receiver) -> None:
    async with traced_worker(fake, endpoint.url):
        await run_job(fake.client(), prompt="a", max_tokens=2, traceparent=f"00-{'0' * 32}-{PARENT}-01")
        await run_job(fake.client(), prompt="a", max_tokens=2, traceparent="no traceparent")
        await run_job(fake.client(), prompt="a", max_tokens=2)
    roots = endpoint.named("text_completion echo")
    assert [parent_of(root) for root in roots] == ["", "", ""]
    assert len({root.trace_id for root in roots}) == 3
    for attempt in endpoint.named("attempt"):
        assert parent_of(attempt) in [root.span_id.hex() for root in roots if root.trace_id == attempt.trace_id]


async def test_a_trace_that_is_not_sampled_has_no_spans_but_counts(fake: Harness, endpoint: Receiver) -> None:
    async with traced_worker(fake, endpoint.url):
        await run_job(fake.client(), prompt="a", max_tokens=2, traceparent=f"00-{TRACE}-{PARENT}-00")
    assert endpoint.spans == []
    assert endpoint.histograms["gen_ai.server.request.duration"][0].count == 1


async def test_the_gateway_obeys_the_flag_and_passes_it_on(server: Server, endpoint: Receiver) -> None:
    harness = ServerHarness(server.url)
    with opened(endpoint.url, "gateway") as of_gateway:
        async with traced_worker(harness, endpoint.url), gateway(harness, tracing=of_gateway) as running:
            await running.wait_for_model("echo")
            await _complete(running, f"00-{TRACE}-{PARENT}-00")
            assert endpoint.spans == []
            await _complete(running, "garbage")
            await running.http().get("/health")
    await harness.close()
    request = endpoint.one("POST /v1/completions")
    assert parent_of(request) == ""
    assert parent_of(endpoint.one("text_completion echo")) == request.span_id.hex()


async def _complete(running: Gateway, traceparent: str) -> None:
    body = {"model": "echo", "prompt": "a", "max_tokens": 2}
    response = await running.http().post("/v1/completions", json=body, headers={"traceparent": traceparent})
    assert response.status_code == 200, response.text


async def test_failed_and_cancelled_jobs_have_their_code(fake: Harness, endpoint: Receiver) -> None:
    client = fake.client()
    cancelled = await client.submit(prompt="a", traceparent=f"00-{TRACE}-{PARENT}-01")
    assert await client.cancel(cancelled) == "cancelled"
    async with traced_worker(fake, endpoint.url):
        await run_job(client, prompt=SECRET, max_tokens=1_000_000)
        await _wait_for_empty_queue(client)
    spans = {attributes_of(span)["error.type"]: span for span in endpoint.named("text_completion echo")}
    assert sorted(spans) == ["CANCELLED", "INVALID_REQUEST"]
    for code, span in spans.items():
        assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, code)
    assert parent_of(spans["CANCELLED"]) == PARENT
    assert SECRET.encode() not in b"".join(endpoint.bodies)
    counted = endpoint.histograms["gen_ai.server.request.duration"]
    assert sorted(attributes_of(point)["error.type"] for point in counted) == ["CANCELLED", "INVALID_REQUEST"]
    assert "gen_ai.server.time_to_first_token" not in endpoint.histograms


async def test_each_worker_that_continues_a_job_adds_an_attempt(fake: Harness, endpoint: Receiver) -> None:
    client = fake.client()
    job_id = await client.submit(prompt="a b c d", max_tokens=40, traceparent=f"00-{TRACE}-{PARENT}-01")
    slow = SharedModel(lambda: load_echo(4096, 64, 0.02, lambda done, total: None))
    async with traced_worker(fake, endpoint.url, slow.fresh(), grace_s=0.0) as worker:
        await wait_until(lambda: _has_tokens(client, job_id))
        assert await worker.stop() == 0
    async with traced_worker(fake, endpoint.url, name="w2"):
        await client.result(job_id, idle_s=20)
    job, attempts = endpoint.one("text_completion echo"), endpoint.named("attempt")
    assert [attributes_of(span)["worker.outcome"] for span in attempts] == ["handed_back", "completed"]
    assert [parent_of(span) for span in attempts] == [job.span_id.hex()] * 2
    assert {span.trace_id.hex() for span in endpoint.spans} == {TRACE}
    assert len(endpoint.named("queue wait")) == 1
    drawn = [attributes_of(span)["gen_ai.usage.output_tokens"] for span in attempts]
    assert drawn[0] > 0
    assert sum(drawn) == attributes_of(job)["gen_ai.usage.output_tokens"] == 40
    for attempt in attempts:
        assert_within(attempt, job)
    assert "gen_ai.server.time_to_first_token" not in endpoint.histograms  # the first worker's, which did not end it


async def _has_tokens(client: Client, job_id: str) -> bool:
    return any(item.kind == "token" for item in await client.published(job_id))


async def _wait_for_empty_queue(client: Client) -> None:
    async def empty() -> bool:
        return not await client.queue()

    await wait_until(empty, 20)


async def test_an_endpoint_that_is_away_costs_one_log_line_a_signal(
    fake: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    output = io.StringIO()
    with socket.socket() as bound:  # not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://user:s3cret@127.0.0.1:{bound.getsockname()[1]}"
        with opened(url, output=output) as found:
            async with serving(fake, SharedModel.echo().fresh(), lease=LONG_LEASE, tracing=found):
                for _ in range(3):
                    await run_job(fake.client(), prompt="a", max_tokens=2)
                    await wait_until(lambda: _logged(output), 20)
            began = time.monotonic()
        assert time.monotonic() - began < 5
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert {(line["event"], line["reason"]) for line in lines} == {("tracing_lost", "no reply (ConnectionError)")}
    assert [line["signal"] for line in lines] in (["traces"], ["traces", "metrics"])  # metrics are sent at the end
    assert "s3cret" not in output.getvalue()


async def _logged(output: io.StringIO) -> bool:
    return "tracing_lost" in output.getvalue()


@pytest.mark.parametrize(("refused", "kept"), [("metrics", "traces"), ("traces", "metrics")])
async def test_a_collector_of_one_signal_costs_one_log_line_and_gets_all_of_it(
    refused: str, kept: str, endpoint: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    endpoint.statuses[f"/v1/{refused}"] = 404
    output = io.StringIO()
    with opened(endpoint.url, output=output) as found:
        for round_ in range(1, 4):
            found.add("attempt", None, (1, 2), {})
            found.request_duration(1.0, {})

            async def both_were_sent(rounds: int = round_) -> bool:
                return len(endpoint.refused) >= rounds and len(endpoint.bodies) >= rounds

            await wait_until(both_were_sent, 20)
        found.add("last", None, (1, 2), {})
        found.request_duration(1.0, {})
    if kept == "traces":
        assert [span.name for span in endpoint.spans] == ["attempt"] * 3 + ["last"]
    else:
        assert endpoint.histograms["gen_ai.server.request.duration"][0].count == 4
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [(line["event"], line["signal"], line["reason"]) for line in lines] == [
        ("tracing_lost", refused, "HTTP status 404")
    ]


async def test_an_endpoint_that_never_replies_delays_the_end_by_half_a_second(fake: Harness) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        opened(f"http://127.0.0.1:{silent.getsockname()[1]}") as found,
    ):
        async with serving(fake, SharedModel.echo().fresh(), lease=LONG_LEASE, tracing=found):
            await run_job(fake.client(), prompt="a", max_tokens=2)
        began = time.monotonic()
        found.close()
        assert time.monotonic() - began < 5  # the exporter itself would wait for 10 s


def test_more_spans_than_the_queue_holds_are_dropped_and_nothing_waits() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        opened(f"http://127.0.0.1:{silent.getsockname()[1]}") as found,
    ):
        for _ in range(20_000):
            found.add("attempt", None, (1, 2), {})
        processor = found._provider._active_span_processor._span_processors[0]
        assert len(processor._batch_processor._queue) <= 2048


async def test_workers_as_processes_take_the_endpoint_from_the_environment(
    server: Server, endpoint: Receiver, tmp_path: Path
) -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint.url,
        "OTEL_SERVICE_NAME": "own",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    harness = ServerHarness(server.url)
    with workers(server.url, tmp_path, ("--echo",), **environment) as (process,):
        await run_job(harness.client(), prompt="a", max_tokens=2)

        async def received() -> bool:
            return len(endpoint.spans) == 5

        await wait_until(received, 20)
        process.send(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not process.logged("tracing_fault")
    await harness.close()
    assert set(endpoint.services) == {"own"}


def test_without_an_endpoint_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert open_tracing(TracingSection(), "worker", "w", open_log(LogSection(), "w", io.StringIO())) is None
    code = (
        "import sys, worker.cli.serving, worker.cli.gateway, worker.gateway.app, worker.service\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


NO_PACKAGES = (
    "is set, and tracing needs opentelemetry-sdk, opentelemetry-exporter-otlp-proto-http; "
    "pip install 'worker-orcd[tracing]'"
)


def test_a_setting_without_the_packages_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ConfigInvalid) as found:
        open_tracing(
            TracingSection(endpoint="http://h:4318"), "worker", "w", open_log(LogSection(), "w", io.StringIO())
        )
    assert found.value.message == f"tracing.endpoint {NO_PACKAGES}"


def warnings_without_tracing() -> list[tuple[str, str]]:
    """Event and reason of each log line of a process that has only the variable and does not trace."""
    output = io.StringIO()
    log = open_log(LogSection(format="json"), "w", output)
    assert open_tracing(load_settings().tracing, "worker", "w", log) is None
    return [(line["event"], line["reason"]) for line in map(json.loads, output.getvalue().splitlines())]


def test_a_variable_without_the_packages_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://h:4318")
    assert warnings_without_tracing() == [("tracing_off", f"OTEL_EXPORTER_OTLP_ENDPOINT {NO_PACKAGES}")]


NO_URLS = [
    *("localhost:4317", "grpc://h:4317", "http://", "http://[", "http://h:port", "secret", "http://:4318"),
    *("http://h:99999", "http://h:0", "http://a b:4318", "http://h:4318/a b", "http://h\n:4318", "http://h;x:1"),
    *("http://h:4318?x", "http://h:4318#x", "http://h:4318 http://i:4318"),
]


@pytest.mark.parametrize("given", NO_URLS)
def test_a_variable_that_is_no_url_is_one_warning(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", given)
    reason = "OTEL_EXPORTER_OTLP_ENDPOINT must be a URL of OTLP over HTTP such as http://127.0.0.1:4318"
    assert warnings_without_tracing() == [("tracing_off", reason)]
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert warnings_without_tracing() == []


@pytest.mark.parametrize("given", NO_URLS)
def test_a_setting_that_is_no_url_is_refused(given: str) -> None:
    with pytest.raises(ConfigInvalid) as found:
        load_settings(flags={"tracing.endpoint": given})
    assert found.value.message == "tracing.endpoint: must be a URL of OTLP over HTTP such as http://127.0.0.1:4318"


WHOLE = "must be a whole number from 0 to 2147483647"
NUMBER = "must be a number above 0 and up to 2147483647"
OUT_OF_RANGE = [
    *(("OTEL_BSP_MAX_QUEUE_SIZE", value, f"OTEL_BSP_MAX_QUEUE_SIZE {NUMBER}") for value in ("0", "-1", "1" * 30, "a")),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0", f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE {NUMBER}"),
    *(
        (name, value, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE, {}, must be at most OTEL_BSP_MAX_QUEUE_SIZE, {}".format(*sizes))
        for name, value, *sizes in (
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2049", 2049, 2048),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "511", 512, 511),
        )
    ),
    *(("OTEL_BSP_SCHEDULE_DELAY", value, f"OTEL_BSP_SCHEDULE_DELAY {NUMBER}") for value in ("0", "-5", "1" + "0" * 30)),
    *(("OTEL_METRIC_EXPORT_INTERVAL", value, f"OTEL_METRIC_EXPORT_INTERVAL {NUMBER}") for value in ("0", "1e30")),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "nan", f"OTEL_EXPORTER_OTLP_TIMEOUT {NUMBER}"),
    *(("OTEL_ATTRIBUTE_COUNT_LIMIT", value, f"OTEL_ATTRIBUTE_COUNT_LIMIT {WHOLE}") for value in ("-1", "x", "5.5")),
    ("OTEL_SPAN_LINK_COUNT_LIMIT", "1" * 30, f"OTEL_SPAN_LINK_COUNT_LIMIT {WHOLE}"),
    (
        *("OTEL_METRICS_EXEMPLAR_FILTER", "some"),
        "OTEL_METRICS_EXEMPLAR_FILTER must be one of always_on, always_off, trace_based",
    ),
]


@pytest.mark.parametrize(("name", "value", "reason"), OUT_OF_RANGE)
def test_a_variable_out_of_range_is_one_warning_or_refused_with_the_setting(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://h:4318")
    monkeypatch.setenv(name, value)
    assert warnings_without_tracing() == [("tracing_off", reason)]
    with pytest.raises(ConfigInvalid) as found, opened("http://h:4318"):
        pass
    assert found.value.message == reason


def test_variables_at_the_ends_of_their_ranges_are_used(endpoint: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        *(("OTEL_BSP_MAX_QUEUE_SIZE", "1"), ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")),
        *(("OTEL_BSP_SCHEDULE_DELAY", "2147483647"), ("OTEL_METRIC_EXPORT_INTERVAL", "2147483647")),
        *(("OTEL_ATTRIBUTE_COUNT_LIMIT", "2147483647"), ("OTEL_SPAN_LINK_COUNT_LIMIT", "0")),
        *(("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5"), ("OTEL_BSP_EXPORT_TIMEOUT", " ")),
    ):
        monkeypatch.setenv(name, value)
    with opened(endpoint.url) as found:
        found.add("a", None, (1, 2), {"b": 5})
    assert [span.name for span in endpoint.spans] == ["a"]


def test_a_command_that_does_not_trace_ignores_the_variable(server: Server) -> None:
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4317", "WORKER_REDIS__URL": server.url}
    command = [sys.executable, "-m", "worker", "jobs"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "OTEL" not in ended.stderr


def test_the_setting_wins_over_the_variable(endpoint: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as other:
        for url, expected in (("", other), (endpoint.url, endpoint)):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", other.url)
            with opened(url) as found:
                found.add("attempt", None, (1, 2), {})
            assert [span.name for span in expected.spans] == ["attempt"]
        assert len(other.spans) == 1


def test_a_sampler_of_the_environment_decides_about_new_traces(
    endpoint: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with opened(endpoint.url) as found:
        assert isinstance(found, Tracing)
        assert not found.planned(None, 7, 8).trace_flags.sampled
        found.add("a", found.planned(None, 7, 8), (1, 2), {})
        found.add("b", Tracing.parent_of(f"00-{TRACE}-{PARENT}-01"), (1, 2), {})
    assert [span.name for span in endpoint.spans] == ["b"]
