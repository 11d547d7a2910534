"""Decode speed by context as a PNG, one panel per model: measured, bandwidth limit, llama.cpp.

    python -m benchmarks.plot RESULT.json… --out docs/decode.png

Needs matplotlib: the dependency group `bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from benchmarks.recorded import read, stem
from benchmarks.reference import REFERENCES
from worker.bench.result import Result

MEASURED, LIMIT, THEIRS = "#0072b2", "#555555", "#d55e00"  # distinguishable with colour blindness
PANEL_INCHES, HEIGHT_INCHES, DPI = 3.3, 3.6, 130


def plot(results: Sequence[Result], out: Path) -> None:
    """Write one panel for each result."""
    canvas = Canvas(figsize=(PANEL_INCHES * len(results), HEIGHT_INCHES), layout="constrained")
    panels = canvas.subplots(1, len(results), squeeze=False)[0]
    for panel, result in zip(panels, results, strict=True):
        _panel(panel, result)
    panels[0].set_ylabel("tokens/s, one sequence", fontsize=8)
    columns = 3 if len(results) > 2 else 1
    labels = panels[0].get_legend_handles_labels()
    canvas.legend(*labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    canvas.savefig(out, dpi=DPI, metadata={"Software": None})


def _panel(panel: Any, result: Result) -> None:
    decode = result.figures["decode"]
    contexts, medians = [int(figure.at) for figure in decode], [figure.median for figure in decode]
    limits = [figure.limit or 0.0 for figure in decode]
    panel.plot(contexts, limits, "--", color=LIMIT, label="limit: read bandwidth / bytes per token")
    panel.plot(contexts, medians, "o-", color=MEASURED, markersize=4, label="measured, minimum to maximum")
    panel.fill_between(contexts, [f.low for f in decode], [f.high for f in decode], color=MEASURED, alpha=0.25)
    theirs = REFERENCES[stem(result)].llama_decode if stem(result) in REFERENCES else {}
    panel.plot(list(theirs), list(theirs.values()), "x", color=THEIRS, label="llama.cpp, October 2026")
    for where in (0, -1):
        panel.annotate(
            f"{100 * medians[where] / limits[where]:.0f} %", (contexts[where], medians[where]),
            textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8, color=MEASURED,
        )  # fmt: skip
    panel.set_title(stem(result), fontsize=10)
    panel.set_xlabel(f"tokens of context\n{result.machine.device}, {result.bandwidth_gb_s:,.0f} GB/s", fontsize=8)
    panel.set_ylim(0, 1.08 * max(limits))
    set_style(panel)


def set_style(panel: Any) -> None:
    """Set the frame, number format, label size and grid of a panel."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    chosen = parser.parse_args()
    plot(read(chosen.results), chosen.out)
    print(chosen.out)


if __name__ == "__main__":
    main()
