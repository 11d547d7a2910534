"""The tables of docs/performance.md, in Markdown, out of what `worker bench --json` wrote.

    python -m benchmarks.report RESULT.json… [--into docs/performance.md]

With --into the page's lines between the two marks are replaced; whatever else stands there is left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.field import FIELD, Field
from benchmarks.recorded import at, read, stem
from worker.bench.result import Figure, Result

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SHORT, MIDDLE, LONG = 128, 2048, 3500
NONE = "–"


def report(results: Sequence[Result]) -> str:
    """Every table, with the machine above each group of models that share one."""
    parts = []
    for where in dict.fromkeys(map(_where, results)):
        here = [result for result in results if _where(result) == where]
        parts += [where, _against(here), _decode(here), _prefill(here), _rest(here)]
    return "\n\n".join(parts)


def _where(result: Result) -> str:
    machine = result.machine
    software = [("driver", machine.driver), ("CUDA", machine.cuda), ("CuPy", machine.cupy), ("Python", machine.python)]
    said = ", ".join(f"{name} {version}" for name, version in software if version)
    return f"{machine.device}, {said}; worker {result.version}, commit {result.commit or 'unknown'}."


def _against(results: Sequence[Result]) -> str:
    """What was to be reached, what was, and the field."""
    rows = []
    for result in results:
        if stem(result) in FIELD:
            first, *others = _goals(result, FIELD[stem(result)])
            rows += [(stem(result), *first), *(("", *other) for other in others)]
    heads = ("model", "what", "measured", "at least", "aim", "llama.cpp")
    return _table(heads, rows) if rows else "No goals are set for these models."


def _goals(result: Result, goal: Field) -> list[tuple[str, str, str, str, str]]:
    """What, measured, at least (or at most), aim, llama.cpp."""
    short, long = at(result, "decode", SHORT), at(result, "decode", LONG)
    prefill, start = at(result, "prefill", MIDDLE), at(result, "load", "again")
    first = at(result, "first_token", "server")
    theirs = goal.llama_decode
    rows = [
        ("decode after 128 tokens, tokens/s", _median(short), f"{goal.decode_least:,.0f}", f"{goal.decode_aim:,.0f}",
         f"{theirs[0]:,.0f} (after 0)"),
        ("decode after 3,500, tokens/s", _median(long), "", "", f"{theirs[LONG]:,.0f}"),
        ("prefill of 2,048, tokens/s", _median(prefill), f"{goal.prefill_least:,.0f}", "",
         f"{goal.llama_prefill[MIDDLE]:,.0f}"),
        ("first token of 128, XADD to reader, p95, ms", _p95(first), f"≤ {goal.first_token_most:g}", "", ""),
        ("load, s; the goals are a whole start's", _median(start), f"≤ {goal.start_most:g}", f"{goal.start_aim:g}",
         f"{goal.llama_start:g}"),
        ("a job's tokens/s through the server", f"{100 * result.server_share:.1f} %", "95 % of the engine's", "", ""),
    ]  # fmt: skip
    if short and long:
        rows.insert(2, ("a token after 3,500 beyond one after 128, µs", *_long_context(result, short, long), "", ""))
    return rows


def _long_context(result: Result, short: Figure, long: Figure) -> tuple[str, str]:
    """What a token takes longer, and may: 5 % of a short one, and its keys and values at 60 % of the bandwidth."""
    found = 1e6 / long.median - 1e6 / short.median
    allowed = 0.05 * 1e6 / short.median + (long.bytes - short.bytes) / (0.6 * result.bandwidth_gb_s * 1e3)
    return f"{found:.0f}", f"≤ {allowed:.0f}"


def _decode(results: Sequence[Result]) -> str:
    rows = [
        (
            stem(result) if first else "", f"{figure.at:,}", _spread(figure), f"{figure.bytes / 1e6:,.1f}",
            f"{figure.gb_s:,.0f}", f"{figure.percent:.1f} %", f"{figure.limit or 0:,.0f}",
        )
        for result in results for first, figure in _each(result, "decode")
    ]  # fmt: skip
    heads = ("decode", "after tokens", "tokens/s (least to greatest)", "MB a token", "GB/s", "of bandwidth", "limit")
    return _table(heads, rows)


def _prefill(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        goal = FIELD.get(stem(result))
        for first, figure in _each(result, "prefill"):
            theirs = goal.llama_prefill.get(int(figure.at)) if goal else None
            rows.append(
                (
                    stem(result) if first else "", f"{figure.at:,}", _spread(figure), f"{figure.tflops or 0:,.3g}",
                    f"{figure.bytes / 1e6:,.0f}", f"{figure.gb_s:,.0f}", f"{figure.percent:.1f} %",
                    f"{theirs:,.0f}" if theirs else NONE,
                )
            )  # fmt: skip
    heads = ("prefill", "tokens", "tokens/s (least to greatest)", "TFLOP/s", "MB", "GB/s", "of bandwidth", "llama.cpp")
    return _table(heads, rows)


def _rest(results: Sequence[Result]) -> str:
    """First tokens, loads, drawing, and long answers; and what the device read at."""
    rows = []
    for result in results:
        read_at = f"{result.bandwidth_gb_s:,.0f} ({result.bandwidth_low:,.0f} to {result.bandwidth_high:,.0f})"
        rows.append((stem(result), "read bandwidth", f"{read_at} GB/s", "", "", ""))
        for name, title in (("first_token", "first token, {}"), ("load", "load, {}"), ("sampler", "decode, {}"),
                            ("answer", "long answer, {}")):  # fmt: skip
            for _, figure in _each(result, name):
                beside = f"p95 {_p95(figure)} ms" if figure.p95 is not None else ""
                beside = f"{figure.extra_us:+.1f} µs" if figure.extra_us is not None else beside
                share = f"{figure.gb_s:,.1f} GB/s, {figure.percent:.1f} %"
                figured = f"{_spread(figure)} {figure.unit}"
                rows.append(("", title.format(figure.at), figured, beside, f"{figure.bytes / 1e6:,.0f}", share))
    return _table(("model", "what", "median (least to greatest)", "", "MB", "moved at"), rows)


def _each(result: Result, name: str) -> Iterable[tuple[bool, Figure]]:
    """The figures of a name, and whether it is the first of them."""
    return ((number == 0, figure) for number, figure in enumerate(result.figures[name]))


def _median(figure: Figure | None) -> str:
    return NONE if figure is None else _number(figure.median)


def _p95(figure: Figure | None) -> str:
    return NONE if figure is None or figure.p95 is None else f"{figure.p95:.2f}"


def _spread(figure: Figure) -> str:
    return f"{_number(figure.median)} ({_number(figure.low)} to {_number(figure.high)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: words on the left, from the third column on figures on the right."""
    rule = ["---"] * 2 + ["---:"] * (len(heads) - 2)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the page's marks. Ends the program where they are not there."""
    before, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page}: no place to write to; expected the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write into this page in place of stdout")
    chosen = parser.parse_args()
    text = report(read(chosen.results))
    if chosen.into:
        put_into(chosen.into, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
