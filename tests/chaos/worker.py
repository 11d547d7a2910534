"""`worker run` with poison prompts that kill it and, with --unfenced, without fencing.

python -m tests.chaos.worker [--unfenced] run …
"""

from __future__ import annotations

import os
import signal
import sys

from tests.chaos.unfenced import remove_fencing
from tests.chaos.workload import POISON
from worker import cli
from worker.engine import Engine, Sequence


def install_poison() -> None:
    """Make prompts that begin with POISON kill this process."""
    add, resume = Engine.add, Engine.resume

    def kill_if_poisoned(sequence: Sequence) -> None:
        if tuple(sequence.prompt[: len(POISON)]) == POISON:
            os.kill(os.getpid(), signal.SIGKILL)

    def poisoned_add(self: Engine, sequence: Sequence, *, paused: bool = False) -> int:
        if not paused:
            kill_if_poisoned(sequence)
        return add(self, sequence, paused=paused)

    def poisoned_resume(self: Engine, sequence: Sequence) -> None:
        kill_if_poisoned(sequence)
        resume(self, sequence)

    Engine.add, Engine.resume = poisoned_add, poisoned_resume  # type: ignore[method-assign]


if __name__ == "__main__":
    install_poison()
    if "--unfenced" in sys.argv:
        sys.argv.remove("--unfenced")
        remove_fencing()
    cli.main()
