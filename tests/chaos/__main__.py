"""`make chaos [SEED=n] [MINUTES=m]`: one run and its summary. Exit code 1 where the checker found a breach."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.run import Outcome, Plan, run
from tests.chaos.schedule import schedule

CALM_S = 25.0
"""What the start, the last jobs and the verdict take, about."""
GAP_S = 2.2


def main() -> int:
    arguments = _arguments()
    seconds = max(10.0, arguments.minutes * 60 - CALM_S)
    blows = schedule(arguments.seed, seconds, arguments.gap)
    plan = Plan(arguments.seed, seconds, blows, fenced=not arguments.unfenced)
    print(f"seed {arguments.seed}: {len(blows)} blows in {seconds:.0f} s, {'' if plan.fenced else 'NO '}fence")
    say = print if arguments.verbose else _say_nothing
    with tempfile.TemporaryDirectory(prefix="worker-chaos-") as folder:
        try:
            outcome = asyncio.run(_interruptible(plan, Path(folder), say))
        except asyncio.CancelledError:
            print("interrupted; every process has been ended", file=sys.stderr)
            return 130
    _summarize(outcome)
    return 1 if outcome.failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.Random(time.time_ns()).randrange(10_000))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--gap", type=float, default=GAP_S, help="seconds between two blows, on average")
    parser.add_argument("--unfenced", action="store_true", help="take the fence away: the checker must find breaches")
    parser.add_argument("--verbose", action="store_true", help="a line a blow")
    return parser.parse_args()


async def _interruptible(plan: Plan, folder: Path, say: object) -> Outcome:
    """Ctrl-C and SIGTERM end a run by way of every `finally`."""
    task = asyncio.current_task()
    assert task is not None, "asyncio.run made it"
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run(plan, folder, say)  # type: ignore[arg-type]


def _say_nothing(_: str) -> None: ...


def _summarize(outcome: Outcome) -> None:
    ledger, tally, logged = outcome.ledger, outcome.fleet.tally, outcome.logged
    kinds = {kind: sum(job.kind == kind for job in ledger.jobs) for kind in sorted({job.kind for job in ledger.jobs})}
    kills = sum(tally.blows[kind] for kind in ("kill", "kill all"))
    facts = {
        "time": f"{outcome.seconds:.0f} s",
        "jobs": f"{len(ledger.jobs)} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), "
        f"{len(ledger.garbage)} unreadable payloads",
        "tokens": f"{sum(len(job.heard) for job in ledger.jobs)} heard; readers went back {ledger.rewinds} times",
        "kills of workers": f"{kills} by SIGKILL ({tally.with_a_job['kill'] + tally.with_a_job['kill all']} had a job),"
        f" {tally.poisoned} by poison",
        "other blows": f"{tally.blows['pause']} pauses past the lease ({tally.with_a_job['pause']} had a job), "
        f"{tally.blows['term']} SIGTERM ({tally.with_a_job['term']} had a job)",
        "server restarts": f"{tally.blows['server']}, and {tally.blows['lost second']} that lost the last second "
        f"({outcome.lost_bytes} bytes; {ledger.submitted_again} jobs submitted again, {ledger.repeated} tokens "
        f"heard again, {ledger.reread} readers began anew)",
        "workers started": f"{tally.starts}",
        "takeovers": f"{outcome.resumed['crash']} after a crash or a pause, {outcome.resumed['drain']} handed back",
        "refused zombies": f"{logged['job_let_go fenced']} writes, {logged['job_let_go lost']} renewals",
        "faults logged": f"{sum(n for event, n in logged.items() if 'fault' in event)}",
    }
    for name, fact in facts.items():
        print(f"{name:>17}  {fact}")
    failed = [verdict for verdict in outcome.verdicts if verdict]
    for verdict in failed[:20]:
        for wrong in verdict[:5]:
            print(f"BREACH: {wrong[:600]}")
    print(f"{len(outcome.verdicts) - len(failed)} passed, {len(failed)} failed")


if __name__ == "__main__":
    sys.exit(main())
