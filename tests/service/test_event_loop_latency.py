"""The latency of the event loop while the engine computes."""

from __future__ import annotations

import asyncio
import time

from tests.service.serving import run_job, serving

ROUNDS = 6
"""On a busy machine an idle loop is late too: one round within the limit is enough."""


async def lateness(work):
    """Sorted seconds by which sleeps of 1 ms were late during `work`, and the result of `work`."""
    done, late = asyncio.create_task(work), []
    await asyncio.sleep(0)
    while not done.done():
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        late.append(time.perf_counter() - began - 0.001)
    return sorted(late), done.result()


async def test_the_loop_is_late_by_under_20_ms_during_a_prefill_of_2000_tokens(fake, model, short_switch_interval):
    client, prompt = fake.client(), [5 + n % 200 for n in range(2000)]
    async with serving(fake, model("gpt-oss").fresh()):
        for _ in range(ROUNDS):
            idle, _ = await lateness(asyncio.sleep(1))
            late, result = await lateness(run_job(client, prompt_tokens=prompt, max_tokens=1))
            assert result.last.prompt_tokens == 2000
            assert len(late) >= 200
            p99, allowed = late[int(len(late) * 0.99)], max(0.020, 3 * idle[int(len(idle) * 0.99)])
            if p99 < allowed:
                break
    assert p99 < allowed


async def test_decoding_a_payload_of_a_megabyte_does_not_block_the_loop(fake, model, short_switch_interval):
    client = fake.client()
    async with serving(fake, model("phi3").fresh()):
        worst = []
        while len(worst) < ROUNDS and not any(seconds < 0.1 for seconds in worst):
            late, result = await lateness(run_job(client, prompt="the world " * 100_000, max_tokens=1))
            assert result.last.code == "INVALID_REQUEST"
            worst.append(late[-1])
    assert min(worst) < 0.1
