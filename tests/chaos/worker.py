"""`worker run` with what only a test may have: prompts that kill, and no fence where that is asked for.

python -m tests.chaos.worker [--unfenced] run …
"""

from __future__ import annotations

import os
import signal
import sys

from tests.chaos.questions import POISON
from tests.chaos.unfenced import take_the_fence_away
from worker import cli
from worker.engine import Engine, Sequence


def let_poison_work() -> None:
    """A prompt that begins with POISON ends this process, as a fault in a kernel would."""
    add = Engine.add

    def poisoned(self: Engine, sequence: Sequence) -> None:
        if tuple(sequence.prompt[: len(POISON)]) == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, sequence)

    Engine.add = poisoned  # type: ignore[method-assign]


if __name__ == "__main__":
    let_poison_work()
    if "--unfenced" in sys.argv:
        sys.argv.remove("--unfenced")
        take_the_fence_away()
    cli.main()
