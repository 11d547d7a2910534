"""Markdown tables of docs/performance.md from results of `worker bench --json`.

    python -m benchmarks.report RESULT.json… [--into docs/performance.md]

With --into, the lines of the page between the two marks are replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.recorded import at, read, stem
from benchmarks.reference import REFERENCES, Reference
from worker.bench.result import Figure, Result, number

BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
"""Marks of a generated part of a page, by the part's name."""
SHORT, MIDDLE, LONG = 128, 2048, 3500
NONE = "–"


def report(results: Sequence[Result]) -> str:
    """Return all tables, grouped by machine and commit."""
    parts = []
    for where in dict.fromkeys(map(machine_and_commit, results)):
        here = [result for result in results if machine_and_commit(result) == where]
        parts += [where, _against(here), _decode(here), _prefill(here), _rest(here)]
    return "\n\n".join(parts)


def machine_and_commit(result: Result) -> str:
    """Return a sentence with the machine, its software and the measured commit."""
    machine = result.machine
    return f"{machine.device}, {machine.versions}; worker {result.version}, commit {result.commit or 'unknown'}."


def _against(results: Sequence[Result]) -> str:
    """Measured figures beside the goals and llama.cpp."""
    rows = []
    for result in results:
        if stem(result) in REFERENCES:
            first, *others = _goals(result, REFERENCES[stem(result)])
            rows += [(stem(result), *first), *(("", *other) for other in others)]
    heads = ("model", "what", "measured", "at least", "aim", "llama.cpp")
    return table(heads, rows) if rows else "No goals are set for these models."


def _goals(result: Result, goal: Reference) -> list[tuple[str, str, str, str, str]]:
    """Rows of quantity, measured figure, bound, target, llama.cpp."""
    short, long = at(result, "decode", SHORT), at(result, "decode", LONG)
    prefill, start = at(result, "prefill", MIDDLE), at(result, "load", "again")
    first = at(result, "first_token", "server")
    theirs = goal.llama_decode
    rows = [
        ("decode after 128 tokens, tokens/s", _median(short), f"{goal.min_decode:,.0f}", f"{goal.target_decode:,.0f}",
         f"{theirs[0]:,.0f} (after 0)"),
        ("decode after 3,500, tokens/s", _median(long), "", "", f"{theirs[LONG]:,.0f}"),
        ("prefill of 2,048, tokens/s", _median(prefill), f"{goal.min_prefill:,.0f}", "",
         f"{goal.llama_prefill[MIDDLE]:,.0f}"),
        ("first token of 128, XADD to reader, p95, ms", _p95(first), f"≤ {goal.max_first_token_ms:g}", "", ""),
        ("load, s; the goals are a whole start's", _median(start), f"≤ {goal.max_start_s:g}",
         f"{goal.target_start_s:g}", f"{goal.llama_start_s:g}"),
        ("a job's tokens/s through the server", _percent(result.server_share), "95 % of the engine's", "", ""),
    ]  # fmt: skip
    if short and long:
        rows.insert(2, ("a token after 3,500 beyond one after 128, µs", *_long_context(result, short, long), "", ""))
    return rows


def _long_context(result: Result, short: Figure, long: Figure) -> tuple[str, str]:
    """Return the µs that a long context adds to a token, and the bound.

    The bound is 5 % of a short token plus the time of the keys and values at 60 % of the bandwidth.
    """
    measured = 1e6 / long.median - 1e6 / short.median
    bound = 0.05 * 1e6 / short.median + (long.bytes - short.bytes) / (0.6 * result.bandwidth_gb_s * 1e3)
    return f"{measured:.0f}", f"≤ {bound:.0f}"


def _decode(results: Sequence[Result]) -> str:
    rows = [
        (
            stem(result) if first else "", f"{figure.at:,}", spread(figure), f"{figure.bytes / 1e6:,.1f}",
            f"{figure.gb_s:,.0f}", f"{figure.percent:.1f} %", f"{figure.limit or 0:,.0f}",
        )
        for result in results for first, figure in _each(result, "decode")
    ]  # fmt: skip
    heads = ("decode", "after tokens", "tokens/s (min to max)", "MB per token", "GB/s", "of bandwidth", "limit")
    return table(heads, rows)


def _prefill(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        goal = REFERENCES.get(stem(result))
        for first, figure in _each(result, "prefill"):
            theirs = goal.llama_prefill.get(int(figure.at)) if goal else None
            rows.append(
                (
                    stem(result) if first else "", f"{figure.at:,}", spread(figure), f"{figure.tflops or 0:,.3g}",
                    f"{figure.bytes / 1e6:,.0f}", f"{figure.gb_s:,.0f}", f"{figure.percent:.1f} %",
                    f"{theirs:,.0f}" if theirs else NONE,
                )
            )  # fmt: skip
    heads = ("prefill", "tokens", "tokens/s (min to max)", "TFLOP/s", "MB", "GB/s", "of bandwidth", "llama.cpp")
    return table(heads, rows)


def _rest(results: Sequence[Result]) -> str:
    """First tokens, loads, samplers and long answers, with the read bandwidth."""
    rows = []
    for result in results:
        read_at = f"{result.bandwidth_gb_s:,.0f} ({result.bandwidth_low:,.0f} to {result.bandwidth_high:,.0f})"
        rows.append((stem(result), "read bandwidth", f"{read_at} GB/s", "", "", ""))
        for name, title in (("first_token", "first token, {}"), ("load", "load, {}"), ("start", "start to {}"),
                            ("sampler", "decode, {}"), ("answer", "long answer, {}")):  # fmt: skip
            for _, figure in _each(result, name):
                beside = f"p95 {_p95(figure)} ms" if figure.p95 is not None else ""
                beside = f"{figure.extra_us:+.1f} µs" if figure.extra_us is not None else beside
                share = f"{figure.gb_s:,.1f} GB/s, {figure.percent:.1f} %"
                figured = f"{spread(figure)} {figure.unit}"
                rows.append(("", title.format(figure.at), figured, beside, f"{figure.bytes / 1e6:,.0f}", share))
    return table(("model", "what", "median (min to max)", "", "MB", "moved at"), rows)


def _each(result: Result, name: str) -> Iterable[tuple[bool, Figure]]:
    """Yield the figures of a measurement, each with whether it is the first."""
    return ((number == 0, figure) for number, figure in enumerate(result.figures.get(name, ())))


def _median(figure: Figure | None) -> str:
    return NONE if figure is None else number(figure.median)


def _p95(figure: Figure | None) -> str:
    return NONE if figure is None or figure.p95 is None else f"{figure.p95:.2f}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f} %"


def spread(figure: Figure) -> str:
    """Format the median with the extremes."""
    return f"{number(figure.median)} ({number(figure.low)} to {number(figure.high)})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> str:
    """Format a Markdown table: the first `left` columns aligned left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def put_into(page: Path, text: str, name: str = "measured") -> None:
    """Replace the text between the page's marks. Exits with one sentence if they are missing."""
    begin, end = BEGIN.format(name), END.format(name)
    before, begin_found, rest = page.read_text("utf-8").partition(begin)
    _, end_found, after = rest.partition(end)
    if not (begin_found and end_found):
        raise SystemExit(f"{page}: no marks; expected the lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write into this page instead of stdout")
    options = parser.parse_args()
    text = report(read(options.results))
    if options.into:
        put_into(options.into, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
