"""Short runs with real processes, with and without fencing; no process is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.network import NETWORK_FAULTS
from tests.chaos.plan import Plan
from tests.chaos.run import run
from tests.chaos.schedule import REFUSALS, Fault

ROOT = Path(__file__).parents[2]
LOSSES = [Fault(5.0 + 2.0 * n, "lost second", 0, busy=True, pause=1.5) for n in range(8)]
PAUSES = [Fault(5.0 + 1.5 * n, "pause", n % 2, busy=True, pause=1.5) for n in range(5)]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")


def plan(**changes):
    return Plan(**{"seed": 5, "seconds": 15.0, "faults": PAUSES, "orchestrators": 1, "cases": 6, **changes})


async def test_with_fencing_workers_that_resume_after_their_lease_do_no_harm(tmp_path):
    outcome = await run(plan(), tmp_path, lambda _: None)
    assert outcome.failed == []
    assert outcome.resumed["crash"] > 0
    assert len(outcome.run_log.jobs) > 10


async def test_without_fencing_the_checker_finds_violations(tmp_path):
    outcome = await run(plan(fenced=False), tmp_path, lambda _: None)
    assert any("follows the terminal" in each or "token indices" in each for each in outcome.failed), outcome.failed


async def test_a_server_that_refuses_for_longer_than_a_lease_stops_no_job(tmp_path):
    refusals = [Fault(4.0 + 5.0 * n, kind, 0, busy=True, pause=1.6) for n, kind in enumerate(sorted(REFUSALS))]
    outcome = await run(plan(seconds=24.0, faults=refusals), tmp_path, lambda _: None)
    assert outcome.failed == []
    assert {kind: outcome.worker_pool.counts.faults[kind] for kind in REFUSALS} == dict.fromkeys(REFUSALS, 1)
    assert [event for event in outcome.logged if "fault" in event] == []
    assert len(outcome.run_log.jobs) > 10


async def test_workers_with_several_jobs_keep_the_attempts_at_one_job_apart_after_lost_writes(tmp_path):
    outcome = await run(plan(seconds=21.0, faults=LOSSES, max_running=16), tmp_path, lambda _: None)
    assert outcome.failed == []
    assert outcome.worker_pool.counts.faults["lost second"] >= 4
    assert [event for event in outcome.logged if "fault" in event] == []
    assert outcome.logged["job_released fenced"] + outcome.logged["job_released lost"] > 0
    assert len(outcome.run_log.jobs) > 10


NETWORK = [Fault(3.0 + 1.0 * n, kind, 0, n % 5 != 0, 0.8) for n, kind in enumerate([*NETWORK_FAULTS] * 3)]
TAKEN_OVER = ["fail over", "flush", "loading", "close clients", "server clock", "worker clock"]


async def test_faulty_links_lose_and_repeat_nothing(tmp_path):
    outcome = await run(plan(seconds=20.0, faults=[], network_faults=NETWORK, max_running=4), tmp_path, lambda _: None)
    assert outcome.failed == []
    assert outcome.network.counts == dict.fromkeys(NETWORK_FAULTS, 3)
    assert [event for event in outcome.logged if "fault" in event] == []
    assert len(outcome.run_log.jobs) > 10


async def test_a_server_that_is_replaced_flushed_or_loading_and_clock_steps_stop_no_job(tmp_path):
    faults = [Fault(4.0 + 3.0 * n, kind, 0, busy=False, pause=1.5) for n, kind in enumerate(TAKEN_OVER)]
    outcome = await run(plan(seconds=30.0, faults=faults, max_running=4), tmp_path, lambda _: None)
    assert outcome.failed == []
    assert outcome.worker_pool.counts.faults == dict.fromkeys(TAKEN_OVER, 1)
    assert outcome.clocks == (shutil.which("cc") is not None)
    assert [event for event in outcome.logged if "fault" in event] == []
    assert len(outcome.run_log.jobs) > 10


def write_later_release(folder):
    """A copy of this release whose workers write an unknown event before each one, and unknown fields."""
    for package in ("worker", "tests"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "data", "gpu"))
    shutil.copytree(ROOT / "worker" / "gpu", folder / "worker" / "gpu")
    path = folder / "worker" / "jobs" / "lease.py"
    known = "        self.log.append(encode_fields(event.kind, values, self.trace.encoding))\n"
    unknown = known.replace("event.kind, values,", '"added_later", values,')
    changed = path.read_text().replace(known, '        values["added_later"] = 1\n' + unknown + known)
    assert changed.count("added_later") == 2
    path.write_text(changed)
    return folder


async def test_workers_of_two_releases_continue_each_other_s_jobs(tmp_path):
    later = write_later_release(tmp_path / "later")
    kills = [Fault(5.0 + 1.5 * n, "kill", n % 2, busy=True, pause=1.5) for n in range(8)]
    outcome = await run(plan(seconds=20.0, faults=kills, other_release=later), tmp_path, lambda _: None)
    assert outcome.failed == []
    assert outcome.resumed["crash"] > 0
    assert outcome.unknown_events > 10
    assert [event for event in outcome.logged if "fault" in event] == []


def descendants(process):
    assert process.poll() is None, process.communicate()
    return [each for each in psutil.Process(process.pid).children(recursive=True) if each.is_running()]


def wait_until(condition, timeout_s=90.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true after {timeout_s} s"
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_leaves_no_process_and_no_file(how, code, tmp_path):
    command = [sys.executable, "-m", "tests.chaos", "--seed", "1", "--minutes", "1"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        wait_until(lambda: len(descendants(process)) >= 5)  # the server and four workers
        children = descendants(process)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == code
        assert "Traceback" not in stderr
        wait_until(lambda: all(not each.is_running() or each.status() == "zombie" for each in children))
    if how != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_summary():
    command = [sys.executable, "-m", "tests.chaos", "--seed", "1", "--minutes", "0.1", "--gap", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d+ passed, 0 failed", done.stdout.splitlines()[-1])
    for name in ("jobs", "kills of workers", "network", "clock steps", "takeovers", "fenced workers"):
        assert name in done.stdout
