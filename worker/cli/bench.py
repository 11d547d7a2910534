"""`worker bench`: the speed of a model on this machine and the bytes moved. See `worker/bench/`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.bench.bench import run
from worker.bench.result import Figure, Result, number
from worker.cli.console import (
    BackendOption,
    ContextOption,
    JsonOption,
    ModelArgument,
    model_path,
    plain,
    print_json,
    size,
)
from worker.config import load_settings

_WIDTH = 130  # columns if stdout is not a terminal
_TITLES = {
    "decode": "decode at",
    "prefill": "prefill of",
    "first_token": "first token,",
    "load": "load,",
    "start": "start to",
    "sampler": "decode,",
    "answer": "long answer,",
}


def bench(
    model: ModelArgument,
    context: ContextOption = None,
    backend: BackendOption = None,
    max_running: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Also decode 1, 8, 32, … sequences at once, up to N, beside the floor.", metavar="N"
        ),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record in the result; by default that of the git checkout.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Benchmark a model: decode, prefill, first token, load, sampling, jobs through a local server.

    Each figure is the median of at least five runs, with minimum and maximum, the bytes moved, and
    their share of the read bandwidth, which is measured first. Takes half a minute on a GPU, two
    minutes on a CPU, and longer with --max-running. Figures of several sequences and of starts are
    medians of at least three runs.
    """
    path = model_path(model)
    settings = load_settings(
        flags={"engine.backend": backend, "model.context": context, "engine.max_running": max_running}
    )
    with Console(stderr=True).status("") as status:
        result = run(path, settings, lambda what: status.update(f"{path.name}: {what}"))
    if commit is not None:
        result = dataclasses.replace(result, commit=commit)
    if json:
        print_json(result.to_json())
    else:
        _print(result, Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH))


def _print(result: Result, console: Console) -> None:
    model, machine = result.model, result.machine
    about = f"{model.architecture}, {size(model.file_bytes)} in {model.file}"
    console.print(Text.assemble((plain(model.name), "bold"), f"  {plain(about)}"))
    about = f"{machine.versions}, worker {result.version}, commit {result.commit or '–'}"
    console.print(Text.assemble((plain(machine.device), "bold"), f"  {plain(about)}"))
    low, high = result.bandwidth_low, result.bandwidth_high
    console.print(f"reads {result.bandwidth_gb_s:,.0f} GB/s ({low:,.0f} to {high:,.0f}), the reference of every %\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("median", "of runs", "from", "to", "moves", "GB/s", "%", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, title in _TITLES.items():
        for figure in result.figures.get(name, ()):
            table.add_row(*_cells(title, figure))
        table.add_section()
    console.print(table)
    if throughput := result.figures.get("throughput"):
        console.print(
            "\nseveral sequences at once; the floor is the time of weights or products, plus keys and values\n"
        )
        console.print(_at_once(throughput))
    if result.server_share is not None:
        console.print(f"\nThrough the server a job runs at {result.server_share:.1%} of the engine's speed.")


def _at_once(figures: Sequence[Figure]) -> Table:
    """Decode of several sequences at once: one row for each number of them."""
    table = Table(box=None, pad_edge=False)
    for heading in (
        "sequences",
        "tokens/s in all",
        "from",
        "to",
        "floor",
        "% of floor",
        "µs a step",
        "GB/s",
        "context",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        speeds = (number(speed) for speed in (figure.median, figure.low, figure.high, figure.floor or 0))
        table.add_row(
            f"{figure.at}",
            *speeds,
            f"{figure.floor_percent:.1f}",
            f"{figure.step_us:,.0f}",
            f"{figure.gb_s:,.0f}",
            f"{figure.context:,}",
        )
    return table


def _cells(title: str, figure: Figure) -> list[str]:
    notes = {
        "p95": f"95 % within {figure.p95 or 0:,.2f} ms",
        "tflops": f"{number(figure.tflops or 0)} TFLOP/s",
        "limit": f"limit {figure.limit or 0:,.0f}",
        "extra_us": f"{figure.extra_us or 0:+,.1f} µs",
    }
    return [
        f"{title} {figure.at:,} tokens" if isinstance(figure.at, int) else f"{title} {figure.at}",
        f"{number(figure.median)} {figure.unit}",
        str(figure.runs),
        number(figure.low),
        number(figure.high),
        size(figure.bytes),
        f"{figure.gb_s:,.1f}",
        f"{figure.percent:.1f}",
        ", ".join(note for name, note in notes.items() if getattr(figure, name) is not None),
    ]
