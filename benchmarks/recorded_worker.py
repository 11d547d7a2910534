"""`worker run` that also writes the times between the tokens of its sequences to a file.

    python -m benchmarks.recorded_worker FILE SWITCH_MS --model MODEL.gguf …

SWITCH_MS is the GIL's switch interval, 0 for the worker's own. The file is written at exit: the end
of each engine step (`time.monotonic`, which all processes of a machine share), and its numbers of
tokens by the seconds since the previous token of the same sequence.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker import cli
from worker.service.engine_thread import EngineThread


def main() -> None:
    """Run the worker with the arguments after the first two."""
    path, switch_ms, *arguments = sys.argv[1:]
    if switch_s := float(switch_ms) / 1000:
        cli._SWITCH_S = switch_s
    steps: list[tuple[float, list[tuple[float, int]]]] = []
    last: dict[str, float] = {}
    distribute = EngineThread._distribute

    def record(self: EngineThread, tokens: Sequence[Any], at: float) -> None:
        gaps = Counter(at - last[each.sequence_id] for each in tokens if each.sequence_id in last)
        steps.append((at, list(gaps.items())))
        last.update((each.sequence_id, at) for each in tokens)
        distribute(self, tokens, at)

    EngineThread._distribute = record  # type: ignore[method-assign, assignment]
    sys.argv = ["worker", "run", *arguments]
    try:
        cli.main()
    finally:
        Path(path).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
