"""Values as text for `worker top`: untrusted strings, times, sizes, and bars of memory."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

from worker.cli.console import plain, size
from worker.cli.top.snapshot import PURPOSES, WorkerRow

_MAX_TEXT = 500
"""Characters of an untrusted string that a cell is made of; none is wider."""


class Part(NamedTuple):
    """A part of a bar: its share of the whole in any unit, and the letter and the color for it."""

    amount: int
    letter: str
    color: str


COLORS = dict(zip(PURPOSES, ("#4c8dff", "#2fbf71", "#e5a50a", "#c061cb", "#7f8c9b"), strict=True))
"""Color of each purpose of device memory."""
STATE_COLORS = {
    "ready": "#2fbf71",
    "busy": "#4c8dff",
    "running": "#4c8dff",
    "starting": "#e5a50a",
    "draining": "#e5a50a",
    "orphaned": "#e5a50a",
    "stale": "#e0443e",
    "failed": "#e0443e",
}
FREE = "·"


def cell(value: object, style: str = "") -> Text:
    """A value as one line without markup, its control characters escaped."""
    return Text(plain(str(value)[:_MAX_TEXT]), style, no_wrap=True, end="")


def age(seconds: float | None) -> str:
    """A duration in at most 6 characters: `0.4s`, `59s`, `2m05s`, `3h07m`, `12d03h`."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    for unit, lower, factor in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= factor:
            rest = whole % factor // (3600 if factor == 86400 else factor // 60)
            return f"{whole // factor}{unit}{rest:02d}{lower}"
    return f"{whole}s"


def latency(seconds: float | None) -> str:
    """A time to first token: `8.1ms`, `240ms`, `1.2s`."""
    if seconds is None:
        return "-"
    if seconds >= 1:
        return f"{seconds:.1f}s" if seconds < 1000 else age(seconds)
    return f"{seconds * 1000:.0f}ms" if seconds >= 0.01 else f"{seconds * 1000:.1f}ms"


def count(number: float | None) -> str:
    """A number in at most 6 characters: `-`, `3.5`, `940`, `12,400`, `1.2M`."""
    if number is None:
        return "-"
    if number >= 100_000:
        return f"{number / 1e6:.1f}M" if number < 1e9 else f"{number / 1e9:.1f}G"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def bar(parts: Sequence[Part], whole: int, width: int, *, color: bool) -> Text:
    """A bar of `width` cells; without colors, each part is shown by its letter.

    A part above zero has at least one cell as long as there are enough.
    """
    text = Text(no_wrap=True, end="")
    whole = max(whole, sum(part.amount for part in parts))
    if whole <= 0:
        return Text("-".ljust(width), no_wrap=True, end="")
    left = width
    for part in parts:
        cells = min(left, max(1, round(width * part.amount / whole)) if part.amount > 0 else 0)
        text.append(("█" if color else part.letter) * cells, part.color)
        left -= cells
    return text.append(FREE * left, "dim")


def memory_parts(worker: WorkerRow) -> list[Part]:
    """The parts of a worker's memory bar, by purpose."""
    return [Part(worker.memory[purpose], purpose[0], COLORS[purpose]) for purpose in PURPOSES]


def memory_whole(worker: WorkerRow) -> int:
    """All device memory that a worker sees: used by any purpose, and free."""
    return sum(worker.memory.values()) + worker.free


def memory_bar(worker: WorkerRow, width: int, *, color: bool) -> Text:
    """A worker's memory by purpose, what is used, and the whole."""
    used, whole = sum(worker.memory.values()), memory_whole(worker)
    if not whole:
        return Text("-", no_wrap=True, end="")
    label = f" {size(used)} of {size(whole)}" if width >= 34 else f" {size(used)}"
    return bar(memory_parts(worker), whole, max(4, width - max(9, len(label))), color=color) + Text(label)


def kv_use(worker: WorkerRow) -> str:
    """Used KV blocks in percent of all."""
    return f"{100 * worker.kv_blocks_used / worker.kv_blocks:.0f}%" if worker.kv_blocks else "-"


def state_cell(state: str) -> Text:
    """A state in its color; an unknown one without."""
    return cell(state or "-", STATE_COLORS.get(state, ""))
