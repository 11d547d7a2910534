"""What the commands share: the arguments that recur, byte counts for people, progress bars on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from worker import hub
from worker.config import load_settings

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A .gguf file, or a name that `worker pull` knows.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output: one JSON object a line.")]

_stderr = Console(stderr=True)


def model_path(model: str) -> Path:
    """The file of a path or of a pulled name. Raises ModelLoadFailed telling how to get it."""
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
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
