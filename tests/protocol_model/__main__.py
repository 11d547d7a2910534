"""`python -m tests.protocol_model --tokens 3 --pauses 2 --in-all 2`: explore larger bounds.

Exit code 1 and a counterexample if a property does not hold. With `--server`, every distinct call
is then made on a real server as well.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import fields

from tests.jobs.servers import running_server
from tests.protocol_model.automaton import stopped_clocks
from tests.protocol_model.conformance import differences
from tests.protocol_model.explorer import Bounds, Explorer, Faults, Violation
from tests.protocol_model.mutants import MUTANTS, SLOW_MUTANTS


def main() -> int:
    arguments = _arguments()
    faults = Faults(**{each.name: getattr(arguments, each.name) for each in fields(Faults)})
    bounds, servers = Bounds(arguments.tokens, faults), {each.__name__: each for each in MUTANTS | SLOW_MUTANTS}
    began = time.monotonic()
    with stopped_clocks():
        explorer = Explorer(bounds, *([servers[arguments.mutant]] if arguments.mutant else []))
        try:
            explorer.run(arguments.minutes * 60)
        except (Violation, TimeoutError) as stopped:
            print(stopped)
            return 1
        finally:
            print(_figures(explorer, time.monotonic() - began))
    if not arguments.server:
        return 0
    began = time.monotonic()
    with running_server() as server:
        compared, found = differences(explorer, server.url)
    print(f"{compared} calls compared with a real server in {time.monotonic() - began:.0f} s: {len(found)} differences")
    print("\n".join(found[:20]))
    return 1 if found else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.protocol_model", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1, help="length of the answer")
    for each in fields(Faults):
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=int, default=each.default)
    parser.add_argument("--minutes", type=float, default=60.0, help="time after which to stop")
    parser.add_argument(
        "--mutant", choices=[each.__name__ for each in MUTANTS | SLOW_MUTANTS], help="a server that lacks a rule"
    )
    parser.add_argument("--server", action="store_true", help="compare every call with a real server")
    return parser.parse_args()


def _figures(explorer: Explorer, seconds: float) -> str:
    """What was visited, in one line."""
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return (
        f"{len(explorer.came_from)} states, {explorer.transitions} transitions in {seconds:.0f} s, {megabytes} MB; "
        f"{len(explorer.server.nodes)} states of the server, {len(explorer.server.edges)} calls, "
        f"{len(explorer.actors.nodes)} states of actors"
    )


if __name__ == "__main__":
    sys.exit(main())
