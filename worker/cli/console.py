"""Arguments, progress bars and output of the commands; an answer as text or as JSON lines."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from worker.config import load_settings
from worker.errors import ConfigInvalid, WorkerError
from worker.gpu import create_context_in_background
from worker.jobs.events import End, ErrorEvent, Token, json_value
from worker.jobs.protocol import Resolved

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A .gguf file, or the name of a pulled model.")]
ContextOption = Annotated[int | None, typer.Option(help="Context length: prompt and answer together, in tokens.")]
BackendOption = Annotated[str | None, typer.Option(help="cpu or gpu; by default a GPU if available.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output: one JSON object per line.")]


def wake_for(flags: Mapping[str, Any]) -> None:
    """Start to create the CUDA context unless the settings select the CPU or are invalid."""
    with suppress(ConfigInvalid):
        if load_settings(flags=flags).engine.backend != "cpu":
            create_context_in_background()


def model_path(model: str) -> Path:
    """Return the file of a path or of a pulled model. Raises ModelLoadFailed."""
    from worker import hub  # noqa: PLC0415  # imported only by commands that need it

    return hub.resolve(model, load_settings().hub.cache)


def print_json(value: Any) -> None:
    """Print one JSON object on one line and flush.

    Unprintable characters of its texts are JSON escapes, as are bytes that were no UTF-8. Values
    that JSON lacks: see `json_text`.
    """
    text = json_text(value)
    print("".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text), flush=True)


def json_text(value: Any) -> str:
    """JSON of any value: bytes and other types become text; the rest is as in `json_value`."""
    options: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "default": str}
    try:
        return json.dumps(value, **options)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(json_value(value), **options)


def plain(value: object) -> str:
    """Untrusted text for output: control and other unprintable characters as escapes.

    Pass it to `print`, or to Rich as `Text`: Rich reads a string as markup.
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))


def clock(ts_ms: object) -> str:
    """Local time of day of a time in ms since 1970, with ms; `?` for any other value."""
    try:
        at = datetime.fromtimestamp(ts_ms / 1000, UTC).astimezone()  # type: ignore[operator]
    except (TypeError, ValueError, OverflowError, OSError):
        return "?"
    return f"{at:%H:%M:%S}.{at.microsecond // 1000:03d}"


def size(count: float) -> str:
    """Format a byte count in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total bytes) that draws a bar on stderr if it is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console  # noqa: PLC0415  # as above
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class Terminal:
    """Readable output: the answer on stdout, statistics on stderr.

    Reasoning is dimmed on a terminal; if stdout is none, it goes to stderr. A tool call is a line
    of its own: the recipient and the arguments.
    """

    def __init__(self) -> None:
        self._dims = sys.stdout.isatty()
        self._place: tuple[str, int | None] | None = None

    def started(self, resolved: Resolved) -> None:
        """Print nothing."""

    def token(self, token: Token) -> None:
        """Print the token's text, on a new line where another channel or tool call begins."""
        place = (token.channel, token.call)
        if place != self._place and (token.t or token.channel == "tool"):
            self._end_place()
            self._place = place
            if token.channel == "tool":
                self._write(f"{plain(token.recipient)} ")
        if token.t:
            self._write(f"\x1b[2m{token.t}\x1b[0m" if self._dims and token.channel == "reasoning" else token.t)

    def _end_place(self) -> None:
        if self._place is not None:
            self._write("\n")

    def _write(self, text: str) -> None:
        stream = sys.stderr if self._is_aside else sys.stdout
        stream.write(text)
        stream.flush()

    @property
    def _is_aside(self) -> bool:
        return self._place is not None and self._place[0] == "reasoning" and not self._dims

    def ended(self, end: End) -> None:
        """Print the statistics."""
        if self._is_aside:
            self._end_place()
        sys.stdout.write("\n")
        sys.stdout.flush()
        rate = f", {(end.tokens_out - 1) / end.decode_ms * 1000:.1f} tokens/s" if end.tokens_out > 1 else ""
        print(
            f"[{end.finish_reason}: {end.prompt_tokens} prompt tokens, {end.tokens_out} generated, "
            f"the first after {end.ttft_ms:.0f} ms{rate}]",
            file=sys.stderr,
        )

    def failed(self, error: WorkerError) -> None:
        """Print the error as one sentence."""
        print(f"worker: {error.code}: {plain(error.message)}", file=sys.stderr)


class JsonLines:
    """Machine-readable output: one event per line; the last is `end` or `error`."""

    def started(self, resolved: Resolved) -> None:
        """Print the resolved limits and seed."""
        limits = {"max_tokens": resolved.max_tokens, "prompt_tokens": resolved.prompt_len}
        print_json({"event": "started", "model": resolved.model, "seed": resolved.seed, **limits})

    def token(self, token: Token) -> None:
        """Print index, id, text and any requested log-probabilities."""
        print_json({"event": "token", **token.to_fields()})

    def ended(self, end: End) -> None:
        """Print the finish reason and the timings."""
        print_json({"event": End.kind, **end.to_fields()})

    def failed(self, error: WorkerError) -> None:
        """Print the error event that a job's stream would contain."""
        print_json({"event": ErrorEvent.kind, **ErrorEvent.of(error).to_fields()})
