"""The status hash of a worker: speed, quantiles, memory by purpose, last errors."""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.jobs.harness import Harness, wait_until
from tests.service.serving import LONG_LEASE, read_job, serving
from worker.echo import load_echo
from worker.service import recent_speed
from worker.service.recent_speed import RecentSpeed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock for `RecentSpeed`; set its `now_s`."""
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(recent_speed, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


def test_a_steady_rate_is_found_from_the_first_second_on_and_forgotten_after_ten(clock: SimpleNamespace) -> None:
    speed = RecentSpeed()
    assert speed.tokens_per_second == 0
    for step in range(1, 301):  # 200 tokens/s for 30 s
        clock.now_s = 1000 + step / 10
        speed.count_tokens(20)
        if step >= 20:
            assert speed.tokens_per_second == pytest.approx(200, rel=0.06)
    clock.now_s += 5
    assert speed.tokens_per_second == pytest.approx(100, rel=0.1)
    clock.now_s += 6
    assert speed.tokens_per_second == 0


def test_quantiles_are_of_the_last_five_minutes(clock: SimpleNamespace) -> None:
    speed = RecentSpeed()
    assert speed.ttft_quantiles(0.5) is None
    speed.first_token(9.0)
    clock.now_s += 299
    speed.first_token(1.0)
    assert speed.ttft_quantiles(0.5, 0.95) == [1.0, 9.0]
    clock.now_s += 2
    assert speed.ttft_quantiles(0.5, 0.95) == [1.0, 1.0]
    clock.now_s += 300
    assert speed.ttft_quantiles(0.5, 0.95) is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=recent_speed.TTFT_VALUES))
def test_quantiles_are_those_of_the_statistics_module(values: list[float]) -> None:
    speed = RecentSpeed()
    for value in values:
        speed.first_token(value)
    p50, p95 = speed.ttft_quantiles(0.5, 0.95) or ()
    assert p50 == statistics.median_low(values)
    assert sum(value <= p95 for value in values) >= math.ceil(0.95 * len(values))
    assert sum(value < p95 for value in values) < 0.95 * len(values)


async def test_the_status_has_speed_and_memory_and_the_last_errors_without_cancellations(fake: Harness) -> None:
    client = fake.client()
    model = load_echo(512, 512, 0.002, lambda done, total: None, max_running=3)
    async with serving(fake, model, lease=LONG_LEASE) as worker:

        async def status() -> dict[str, str]:
            return dict((await client.workers()).get(worker.name, {}))

        async def speed_is_shown() -> bool:
            return float((await status()).get("tokens_per_second", 0)) > 0

        async def is_ready() -> bool:
            return (await status()).get("max_running") == "3"

        await wait_until(is_ready)
        assert "ttft_p50_s" not in await status()
        await client.submit(job_id="good", prompt="abc", max_tokens=100)
        await read_job(client, "good")
        for number in range(7):
            await client.submit(job_id=f"bad-{number}", prompt="x" * 600, max_tokens=1)
            await read_job(client, f"bad-{number}")
        await client.submit(job_id="cancelled", prompt="abc", max_tokens=500)
        await client.cancel("cancelled")
        await read_job(client, "cancelled")
        await wait_until(speed_is_shown)

        async def errors_are_shown() -> bool:
            shown = json.loads((await status())["last_errors"])
            return [error["job_id"] for error in shown[-1:]] == ["bad-6"]

        await wait_until(errors_are_shown)
        found = await status()
    errors = json.loads(found["last_errors"])
    assert [error["job_id"] for error in errors] == [f"bad-{number}" for number in range(2, 7)]
    assert {error["code"] for error in errors} == {"INVALID_REQUEST"}
    assert all(error["message"] and error["ts_ms"] > 1_600_000_000_000 for error in errors)
    assert 0 < float(found["ttft_p50_s"]) <= float(found["ttft_p95_s"]) < 60
    purposes = [int(found[f"vram_{name}"]) for name in ("weights", "kv", "activations", "workspace", "runtime")]
    assert sum(purposes) == int(found["vram_used"])
