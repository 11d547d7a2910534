"""`worker run` with a full-size file: its memory figures, and quick cancellation.

Skipped if the file is missing; `suite.py --synth` writes it.
"""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest

from tests.gpu.full import path_of
from tests.gpu.served import device_bytes, settle

MODEL, CONTEXT, PROMPT, IDLE_S = "gpt-oss-20b", 40_960, 40_000, 60
ANSWERED = {"max_tokens": 600, "temperature": 0.8, "seed": 3, "ignore_eos": True}
CANCEL_S, TIMES = 0.1, 3
MIB = 1 << 20


@pytest.fixture
def worker(gpu, start):
    """A ready worker; otherwise the GPU holds only this process' CUDA context."""
    path = path_of(MODEL)
    settle()
    return start(path, "--context", CONTEXT)


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 200_000, count).tolist()


def close(found, drivers):
    return abs(found - drivers) <= max(0.01 * drivers, 32 * MIB)


def own_events(client, worker):
    """The worker's own events up to `stopped`."""
    events = []
    for item in client.worker_events(worker.id):
        events.append(item.event)
        if item.kind == "stopped":
            return events


def test_a_worker_s_reported_memory_equals_the_driver_s(worker, client, record_property):
    client.submit(job_id="a", prompt_tokens=random_ids(1000), **ANSWERED)
    published = list(client.events("a", idle_s=IDLE_S))
    drivers, (free, total) = device_bytes(), memory_info()
    runtime = worker.metric('worker_vram_bytes{purpose="runtime"}')
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    events = own_events(client, worker)
    vram = [event for event in events if event.kind == "vram"]
    sums = [each.weights + each.kv + each.activations + runtime for each in vram]
    record_property(
        f"{MODEL} vram events",
        f"{max(sums) / MIB:,.0f} MiB, driver {drivers / MIB:,.0f} MiB; free {vram[-1].free / MIB:,.0f} MiB, driver "
        f"{free / MIB:,.0f} MiB",
    )
    assert len(vram) >= 2
    assert all(close(each, drivers) for each in sums)
    assert all(close(each.free, free) for each in vram)
    for metrics in (item.event for item in published if item.kind == "metrics"):
        assert close(metrics.vram_used, drivers)
        assert close(metrics.vram_used + metrics.vram_free, total)
    assert [event.percent for event in events if event.kind == "load_progress"] == [0, 25, 50, 75, 100]
    checks = [event for event in events if event.kind == "residency"]
    assert checks
    assert all(check.ok and check.checked > 1 for check in checks)


def memory_info():
    import cupy

    return cupy.cuda.runtime.memGetInfo()


def test_a_job_cancelled_in_prefill_or_decode_ends_within_100_ms(worker, client, record_property):
    took = {"prefill": [], "decode": []}
    for n in range(TIMES):
        long, short = random_ids(PROMPT, n), random_ids(100, n)
        client.submit(job_id=f"p{n}", prompt_tokens=long, max_tokens=9)
        took["prefill"].append(cancelled(client, f"p{n}", lambda item: item.kind == "metrics"))
        client.submit(job_id=f"d{n}", prompt_tokens=short, max_tokens=20_000, ignore_eos=True)
        took["decode"].append(cancelled(client, f"d{n}", lambda item: item.kind == "token" and item.event.i >= 100))
    record_property(
        f"{MODEL} cancelled after",
        "; ".join(f"{phase} {', '.join(f'{1e3 * each:.0f}' for each in times)} ms" for phase, times in took.items()),
    )
    _, end = client.result(client.submit(prompt_tokens=random_ids(50), **ANSWERED), idle_s=IDLE_S)
    assert end.tokens_out == ANSWERED["max_tokens"]
    assert worker.popen.poll() is None
    assert max(took["prefill"] + took["decode"]) < CANCEL_S


def cancelled(client, job_id, when):
    """Seconds from the cancellation, at the first event that satisfies `when`, to the end."""
    events, requested_at, tokens = client.events(job_id, idle_s=IDLE_S), 0.0, 0
    for item in events:
        tokens += item.kind == "token"
        if not requested_at and when(item):
            assert (item.kind == "metrics") == (tokens == 0), "the prompt was over before it could be cancelled"
            requested_at = time.perf_counter()
            assert client.cancel(job_id) == "requested"
    took = time.perf_counter() - requested_at
    assert item.event.code == "CANCELLED"
    return took
