"""`make soak`, `python -m tests.soak [NAME…]`: run scenarios, print one table. Exit code 1 on a violation."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.soak.figures import Figure, table

SCENARIOS = ("backlog", "memory", "cancels", "readers", "deaths", "outage", "gateway")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}; by default all")
    parser.add_argument("--short", action="store_true", help="the forms that CI runs")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(SCENARIOS)):
        parser.error(f"there is no scenario {', '.join(unknown)}; expected some of {', '.join(SCENARIOS)}")
    try:
        results = [(name, _run(name, short=arguments.short)) for name in arguments.names or SCENARIOS]
    except asyncio.CancelledError:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    print(f"\n{table(results)}\n")
    violations = [f"{name}: {figure.violation}" for name, figures in results for figure in figures if figure.violation]
    for violation in violations:
        print(f"VIOLATION: {violation}")
    print(f"{sum(len(figures) for _, figures in results) - len(violations)} figures hold, {len(violations)} do not")
    return 1 if violations else 0


def _run(name: str, *, short: bool) -> Sequence[Figure]:
    """Run one scenario; an exception of it is a violation, so that the others still run."""
    scenario = importlib.import_module(f"tests.soak.{name}")
    began = time.monotonic()
    print(f"{name} … ", end="", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"worker-soak-{name}-") as folder:
        try:
            figures = asyncio.run(_interruptible(scenario, short, Path(folder)))
        except Exception as error:
            figures = [Figure(f"the scenario raised {type(error).__name__}: {error}", 1, most=0)]
    print(f"{time.monotonic() - began:.0f} s; load average {os.getloadavg()[0]:.1f}")
    return figures


async def _interruptible(scenario, short: bool, folder: Path) -> Sequence[Figure]:
    """Cancel the run on Ctrl-C or SIGTERM, so that every `finally` is executed."""
    task = asyncio.current_task()
    assert task is not None, "asyncio.run creates a task"
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await scenario.run(scenario.SHORT if short else scenario.FULL, folder)


if __name__ == "__main__":
    sys.exit(main())
