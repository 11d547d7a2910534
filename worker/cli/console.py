"""What the commands share: the arguments that recur, byte counts for people, progress bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from worker.config import load_settings
from worker.errors import ConfigInvalid
from worker.gpu.wake import wake_device

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A .gguf file, or a name that `worker pull` knows.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output: one JSON object a line.")]


def wake_for(flags: Mapping[str, Any]) -> None:
    """Begin to wake the GPU unless flags or environment say cpu; what is wrong with them, `load_settings` tells."""
    with suppress(ConfigInvalid):
        if load_settings(flags=flags).engine.backend != "cpu":
            wake_device()


def model_path(model: str) -> Path:
    """The file of a path or of a pulled name. Raises ModelLoadFailed telling how to get it."""
    from worker import hub  # noqa: PLC0415  # what a command doesn't need, it doesn't wait for

    return hub.resolve(model, load_settings().hub.cache)


def print_json(value: Any) -> None:
    """One object on one line of stdout, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def size(count: float) -> str:
    """A byte count for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that hears (done, total) bytes; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console  # noqa: PLC0415  # as above
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
