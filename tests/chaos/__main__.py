"""`make chaos [SEED=n] [MINUTES=m] [RUNNING=n] [GAP=s]`: one run and its summary. Exit code 1 on a violation."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.network import NETWORK_FAULTS
from tests.chaos.plan import Plan
from tests.chaos.run import Outcome, run
from tests.chaos.schedule import REFUSALS, schedule

OVERHEAD_S = 25.0
"""Approximate time of start, last jobs and check."""
HANG_S = 600.0
"""A run that takes this much longer than its faults is ended with the stacks of its threads and exit code 1."""
GAP_S = 2.2
NETWORK_GAP_S = 3.0


def main() -> int:
    arguments = _arguments()
    seconds = max(10.0, arguments.minutes * 60 - OVERHEAD_S)
    faults = schedule(arguments.seed, seconds, arguments.gap)
    network_faults = schedule(arguments.seed, seconds, arguments.network_gap, NETWORK_FAULTS)
    plan = Plan(
        arguments.seed,
        seconds,
        faults,
        network_faults,
        fenced=not arguments.unfenced,
        max_running=arguments.max_running,
        other_release=arguments.other_release,
    )
    print(
        f"seed {arguments.seed}: {len(faults)} faults of processes and {len(network_faults)} of the network "
        f"in {seconds:.0f} s, {'' if plan.fenced else 'un'}fenced",
        flush=True,
    )
    faulthandler.dump_traceback_later(seconds + HANG_S, exit=True)
    report = print if arguments.verbose else _ignore
    if not arguments.verbose:
        logging.getLogger("worker.jobs.streams").setLevel(logging.ERROR)  # a line for each lost connection
    with tempfile.TemporaryDirectory(prefix="worker-chaos-") as folder:
        try:
            outcome = asyncio.run(_interruptible(plan, Path(folder), report))
        except asyncio.CancelledError:
            print("interrupted; all processes have ended", file=sys.stderr)
            return 130
    _summarize(outcome)
    return 1 if outcome.failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.Random(time.time_ns()).randrange(10_000))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument(
        "--gap", type=float, default=GAP_S, help="seconds between two faults of processes, on average (default 2.2)"
    )
    parser.add_argument(
        "--network-gap", type=float, default=NETWORK_GAP_S, help="the same for faults of the network (default 3.0)"
    )
    parser.add_argument("--max-running", type=int, default=1, help="jobs that a worker runs at once")
    parser.add_argument("--other-release", type=Path, metavar="FOLDER", help="a checkout that half of the workers run")
    parser.add_argument("--unfenced", action="store_true", help="disable fencing: the checker must find violations")
    parser.add_argument("--verbose", action="store_true", help="print one line per fault")
    return parser.parse_args()


async def _interruptible(plan: Plan, folder: Path, report: Callable[[str], None]) -> Outcome:
    """Cancel the run on Ctrl-C or SIGTERM, so that every `finally` is executed."""
    task = asyncio.current_task()
    assert task is not None, "asyncio.run creates a task"
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run(plan, folder, report)


def _ignore(_: str) -> None: ...


def _summarize(outcome: Outcome) -> None:
    run_log, counts, logged = outcome.run_log, outcome.worker_pool.counts, outcome.logged
    kinds = {kind: sum(job.kind == kind for job in run_log.jobs) for kind in sorted({job.kind for job in run_log.jobs})}
    kills, links = sum(counts.faults[kind] for kind in ("kill", "kill all")), outcome.network.counts
    facts = {
        "time": f"{outcome.seconds:.0f} s",
        "jobs": f"{len(run_log.jobs)} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), "
        f"{len(run_log.garbage)} unreadable payloads",
        "tokens": f"{sum(len(job.received) for job in run_log.jobs)} received; readers rewound {run_log.rewinds} times",
        "kills of workers": f"{kills} by SIGKILL "
        f"({counts.with_a_job['kill'] + counts.with_a_job['kill all']} had a job), {counts.poisoned} by poison",
        "other faults": f"{counts.faults['pause']} pauses past the lease ({counts.with_a_job['pause']} had a job, "
        f"{counts.woken} woke), {counts.faults['term']} SIGTERM ({counts.with_a_job['term']} had a job)",
        "kills of servers": f"{counts.faults['server'] + counts.faults['loading'] + counts.faults['lost second']}, "
        f"of which {counts.faults['loading']} loaded for longer than a lease and {counts.faults['lost second']} "
        f"lost the last second ({outcome.lost_bytes} bytes)",
        "other losses": f"{counts.faults['fail over']} replicas took over, {counts.faults['flush']} FLUSHALL; "
        f"after all losses {run_log.submitted_again} jobs resubmitted, {run_log.repeated} tokens repeated, "
        f"{run_log.reread} readers restarted",
        "network": f"{sum(links.values())} faults: {', '.join(f'{n} {kind}' for kind, n in links.items())}; "
        f"{counts.faults['close clients']} times CLIENT KILL of all",
        "clock steps": f"{counts.faults['server clock']} of the server, {counts.faults['worker clock']} of workers"
        + ("" if outcome.clocks else " (skipped: no C compiler)"),
        "refusals": ", ".join(f"{counts.faults[kind]} {kind}" for kind in sorted(REFUSALS)),
        "workers started": f"{counts.starts}",
        "takeovers": f"{outcome.resumed['crash']} after a crash or a pause, {outcome.resumed['drain']} after a release",
        "fenced workers": f"{logged['job_released fenced']} writes, {logged['job_released lost']} renewals",
        "faults logged": f"{sum(n for event, n in logged.items() if 'fault' in event)}",
    }
    for name, fact in facts.items():
        print(f"{name:>17}  {fact}")
    failed = [finding for finding in outcome.findings if finding]
    for finding in failed[:20]:
        for problem in finding[:5]:
            print(f"VIOLATION: {problem[:600]}")
    print(f"{len(outcome.findings) - len(failed)} passed, {len(failed)} failed")


if __name__ == "__main__":
    sys.exit(main())
