"""Tables and plot of decode of many sequences at once, beside the floor and other engines.

    python -m benchmarks.throughput_report RESULT.json… [--into REPOSITORY]

The results are those of `benchmarks.throughput --out` or of `worker bench --max-running N --json`.
Without --into the tables are printed. With it, the marked parts of docs/performance.md and
README.md of that folder are replaced, and docs/throughput.png is drawn.

Needs matplotlib: the dependency group `bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure as Canvas

from benchmarks.plot import DPI, HEIGHT_INCHES, LIMIT, MEASURED, PANEL_INCHES, THEIRS, set_style
from benchmarks.recorded import at, read, stem
from benchmarks.reference import AT_ONCE, NAMES, AtOnce
from benchmarks.report import NONE, machine_and_commit, put_into, spread, table
from worker.bench.result import Figure, Result, number

PART = "throughput"
"""The name of the marked parts, of the figures and of the plot."""
VLLM = "#009e73"  # beside the colours of plot.py distinguishable with colour blindness
COLUMNS = 100
"""Length of lines of prose."""
_NO_GOALS = AtOnce({}, {}, {}, {})


def ordered(results: Sequence[Result]) -> list[Result]:
    """Return the results in the order of NAMES, unknown models last. Exits if one lacks figures."""
    for result in results:
        if not result.figures.get(PART):
            raise SystemExit(f"{result.model.file}: no figures of several sequences; measure with --max-running N")
        if any(figure.floor is None for figure in result.figures[PART]):
            raise SystemExit(f"{result.model.file}: figures without a floor, of an earlier version; measure again")
    names = list(NAMES)
    return sorted(results, key=lambda result: names.index(stem(result)) if stem(result) in NAMES else len(names))


def report(results: Sequence[Result]) -> str:
    """Return the part of docs/performance.md: the plot's link, a table by machine and commit."""
    parts = [f"![tokens/s in all against the number of sequences]({PART}.png)"]
    for where in dict.fromkeys(map(machine_and_commit, results)):
        rows: list[Sequence[str]] = []
        for result in results:
            if machine_and_commit(result) == where:
                rows += _rows(result)
        heads = ("model", "sequences", "tokens/s in all (min to max)", "µs a step", "floor", "of floor",
                 "at least", "aim", "vLLM 0.24", "llama.cpp")  # fmt: skip
        parts += [fill(where, COLUMNS), table(heads, rows)]
    return "\n\n".join(parts)


def _rows(result: Result) -> list[Sequence[str]]:
    goal = AT_ONCE.get(stem(result), _NO_GOALS)
    return [
        (
            stem(result) if row == 0 else "", f"{figure.at}", spread(figure), f"{figure.step_us:,.0f}",
            number(figure.floor or 0), f"{figure.floor_percent:.1f} %",
            *(_number(known, figure) for known in (goal.at_least, goal.aim, goal.vllm, goal.llama)),
        )
        for row, figure in enumerate(result.figures[PART])
    ]  # fmt: skip


def _number(known: dict[int, float], figure: Figure) -> str:
    """Format the value for the figure's number of sequences."""
    value = known.get(int(figure.at))
    return NONE if value is None else number(value)


def overview(results: Sequence[Result]) -> str:
    """Return the table of README.md: this worker's, vLLM's and llama.cpp's tokens/s by model."""
    counts = sorted({int(figure.at) for result in results for figure in result.figures[PART]})
    rows = [(f"{count}", *(_beside(result, count) for result in results)) for count in counts]
    names = (NAMES.get(stem(result), stem(result)) for result in results)
    where = " ".join(dict.fromkeys(map(machine_and_commit, results)))
    return f"{table(('sequences', *names), rows, left=1)}\n\n{fill(where, COLUMNS)}"


def _beside(result: Result, count: int) -> str:
    figure, goal = at(result, PART, count), AT_ONCE.get(stem(result), _NO_GOALS)
    if figure is None:
        return NONE
    return " / ".join((f"**{number(figure.median)}**", _number(goal.vllm, figure), _number(goal.llama, figure)))


def plot(results: Sequence[Result], out: Path) -> None:
    """Write a PNG with one panel for each result: tokens/s against sequences, both logarithmic."""
    canvas = Canvas(figsize=(PANEL_INCHES * len(results), HEIGHT_INCHES), layout="constrained")
    panels = canvas.subplots(1, len(results), squeeze=False)[0]
    for panel, result in zip(panels, results, strict=True):
        _panel(panel, result)
    panels[0].set_ylabel("tokens/s in all", fontsize=8)
    labels = panels[0].get_legend_handles_labels()
    columns = 4 if len(results) > 2 else 1
    canvas.legend(*labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    canvas.savefig(out, dpi=DPI, metadata={"Software": None})


def _panel(panel: Any, result: Result) -> None:
    figures, goal = result.figures[PART], AT_ONCE.get(stem(result), _NO_GOALS)
    counts, medians = [int(figure.at) for figure in figures], [figure.median for figure in figures]
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.plot(counts, [figure.floor for figure in figures], "--", color=LIMIT, label="floor of a step's time")
    panel.plot(counts, medians, "o-", color=MEASURED, markersize=4, label="this worker, minimum to maximum")
    panel.fill_between(counts, [f.low for f in figures], [f.high for f in figures], color=MEASURED, alpha=0.25)
    panel.plot(list(goal.vllm), list(goal.vllm.values()), "s-", color=VLLM, markersize=3, label="vLLM 0.24")
    panel.plot(list(goal.llama), list(goal.llama.values()), "x-", color=THEIRS, markersize=4, label="llama.cpp")
    for figure in (figures[0], figures[-1]):
        panel.annotate(
            f"{figure.floor_percent:.0f} %", (int(figure.at), figure.median),
            textcoords="offset points", xytext=(6, 7), ha="center", fontsize=8, color=MEASURED,
        )  # fmt: skip
    panel.set_title(NAMES.get(stem(result), stem(result)), fontsize=10)
    panel.set_xlabel(f"sequences at once\n{result.machine.device}, {result.bandwidth_gb_s:,.0f} GB/s", fontsize=8)
    panel.set_xticks(counts)
    panel.minorticks_off()
    set_style(panel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--into", type=Path, metavar="REPOSITORY", help="write into the pages of this folder")
    chosen = parser.parse_args()
    results = ordered(read(chosen.results))
    if chosen.into is None:
        print(f"{report(results)}\n\n{overview(results)}")
        return
    docs = chosen.into / "docs"
    plot(results, docs / f"{PART}.png")
    put_into(docs / "performance.md", report(results), PART)
    put_into(chosen.into / "README.md", overview(results), PART)


if __name__ == "__main__":
    main()
