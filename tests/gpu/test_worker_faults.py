"""`worker run` on the GPU and Redis: a lost device, a killed process, no memory.

After each fault in the middle of an answer, its reader receives the ids of an undisturbed run, each
once. `tests/service` tests the protocol itself on other devices.
"""

from __future__ import annotations

import signal

import numpy as np
import pytest

from tests.gpu.served import answer, load
from worker.errors import CudaError
from worker.sampling import Sampling

TOKENS, CONTEXT, IDLE_S = 1500, 2048, 60
PROMPT = np.random.default_rng(5).integers(0, 280, 150).tolist()
FIELDS = {"prompt_tokens": PROMPT, "seed": 7, "temperature": 0.8, "max_tokens": TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tiny):
    return tiny("gpt-oss")


@pytest.fixture(scope="module")
def whole(gpu, path):
    """The ids of an undisturbed run."""
    return answer(load(path, context=CONTEXT), PROMPT, Sampling(temperature=0.8, seed=7), TOKENS)


def read_to(events, kind, count=1):
    """The events up to and including the `count`-th of a kind."""
    items = []
    for item in events:
        items.append(item)
        count -= item.kind == kind
        if not count:
            break
    return items


def events_of(client, job_id):
    """A job's events: ids in the order of publication, and all events but tokens and metrics."""
    items = list(client.events(job_id, idle_s=IDLE_S))
    ids = [(item.event.i, item.event.id) for item in items if item.kind == "token"]
    return ids, [item.event for item in items if item.kind not in ("token", "metrics")]


def assert_continued(client, job_id, whole):
    ids, others = events_of(client, job_id)
    assert ids == list(enumerate(whole))
    started, resumed, end = others
    assert (started.kind, resumed.kind, end.kind) == ("started", "resumed", "end")
    assert (resumed.reason, resumed.exact) == ("crash", True)
    assert 0 < resumed.from_i < TOKENS
    assert (end.finish_reason, end.tokens_out) == ("length", TOKENS)


def test_a_lost_device_ends_the_worker_and_another_continues(path, whole, client, start):
    first = start(path, "--context", CONTEXT, FAULT="trap:300")
    client.submit(job_id="a", **FIELDS)
    read_to(client.events("a", idle_s=IDLE_S), "started")
    second = start(path, "--context", CONTEXT)
    assert first.wait(IDLE_S) == CudaError.exit_code == 2
    assert_continued(client, "a", whole)
    own = [item.event for item in read_to(client.worker_events(first.id), "stopped")]
    assert [event.code for event in own if event.kind == "error"] == ["CUDA_ERROR"]
    assert own[-1].exit_code == 2
    assert second.popen.poll() is None


def test_a_killed_workers_job_is_continued_by_another(path, whole, client, start):
    first = start(path, "--context", CONTEXT)
    client.submit(job_id="a", **FIELDS)
    read_to(client.events("a", idle_s=IDLE_S), "token", count=30)
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    start(path, "--context", CONTEXT)
    assert_continued(client, "a", whole)


def test_a_failed_allocation_is_vram_oom_to_the_reader_and_the_next_job_is_right(path, whole, client, start):
    worker = start(path, "--context", CONTEXT, FAULT="oom:1")
    for job_id in ("a", "b"):
        client.submit(job_id=job_id, **FIELDS)
    ids, (started, error) = events_of(client, "a")
    assert (ids, started.kind, error.code, error.retriable) == ([], "started", "VRAM_OOM", True)
    ids, others = events_of(client, "b")
    assert ids == list(enumerate(whole))
    assert [event.kind for event in others] == ["started", "end"]
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    own = [item.event for item in read_to(client.worker_events(worker.id), "stopped")]
    assert [event.code for event in own if event.kind == "error"] == ["VRAM_OOM"]
    held = {(event.weights, event.kv, event.activations) for event in own if event.kind == "vram"}
    assert len(held) == 1, "accounted memory returns to its baseline"
