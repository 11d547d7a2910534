"""`worker` with a census of its event loop and its memory on SIGUSR1: `python -m tests.soak.worker FILE run …`.

The census is written to FILE as JSON: the number of asyncio tasks and of objects that the garbage
collector tracks, by type.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from worker import cli


def write_census(path: Path) -> None:
    """Replace the file, so that a reader never sees a part of it. Called within the event loop."""
    gc.collect()
    objects = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"tasks": len(asyncio.all_tasks()), "objects": objects}))
    os.replace(part, path)


if __name__ == "__main__":
    file = Path(sys.argv.pop(1))
    signal.signal(signal.SIGUSR1, lambda *_: write_census(file))
    cli.main()
