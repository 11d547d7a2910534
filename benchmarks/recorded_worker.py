"""`worker run` that also writes the end of each engine step and its number of tokens to a file.

    python -m benchmarks.recorded_worker FILE SWITCH_MS --model MODEL.gguf …

SWITCH_MS is the GIL's switch interval, 0 for the worker's own. Times are of `time.monotonic`, which
all processes of a machine share. The file is written at exit.
"""

from __future__ import annotations

import json
import sys
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
    steps: list[tuple[float, int]] = []
    distribute = EngineThread._distribute

    def record(self: EngineThread, tokens: Sequence[Any], at: float) -> None:
        steps.append((at, len(tokens)))
        distribute(self, tokens, at)

    EngineThread._distribute = record  # type: ignore[method-assign, assignment]
    sys.argv = ["worker", "run", *arguments]
    try:
        cli.main()
    finally:
        Path(path).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
