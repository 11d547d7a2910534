"""`worker bench`.

The speed of a model on this machine, with the bytes moved and the bandwidth used.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from worker.cli.console import JsonOption, ModelArgument, model_path, print_json, size
from worker.config import load_settings

if TYPE_CHECKING:
    from worker.bench import Figure, Result

_WIDTH = 120  # columns if stdout is not a terminal
_TITLES = {
    "decode": "decode at",
    "prefill": "prefill of",
    "first_token": "first token,",
    "load": "load,",
    "sampler": "decode,",
    "answer": "long answer,",
}


def bench(
    model: ModelArgument,
    context: Annotated[int | None, typer.Option(help="Context length: prompt and answer together, in tokens.")] = None,
    backend: Annotated[str | None, typer.Option(help="cpu or gpu; by default a GPU if available.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record in the result; by default that of the git checkout.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Benchmark a model: decode, prefill, first token, load, sampling, and jobs through an embedded
    server.

    Each figure is the median of at least five runs, with minimum and maximum, the bytes moved, and
    their share of the read bandwidth, which is measured first. Takes half a minute on a GPU, two
    minutes on a CPU.
    """
    from worker.bench import run  # noqa: PLC0415  # redis is imported only here

    path = model_path(model)
    settings = load_settings(flags={"engine.backend": backend, "model.context": context})
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
    about = [("driver", machine.driver), ("CUDA", machine.cuda), ("CuPy", machine.cupy), ("Python", machine.python)]
    versions = ", ".join(f"{name} {version}" for name, version in about if version)
    console.print(f"[bold]{model.name}[/bold]  {model.architecture}, {size(model.file_bytes)} in {model.file}")
    console.print(f"[bold]{machine.device}[/bold]  {versions}, worker {result.version}, commit {result.commit or '–'}")
    console.print(
        f"reads {result.bandwidth_gb_s:,.0f} GB/s ({result.bandwidth_low:,.0f} to {result.bandwidth_high:,.0f}), "
        "to which every % refers\n"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("median", "of runs", "from", "to", "moves", "GB/s", "%", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, title in _TITLES.items():
        for figure in result.figures[name]:
            table.add_row(*_cells(title, figure))
        table.add_section()
    console.print(table)
    console.print(f"\nThrough the server a job runs at {result.server_share:.1%} of the engine's speed.")


def _cells(title: str, figure: Figure) -> list[str]:
    beside = {
        "p95": f"95 % within {figure.p95 or 0:,.2f} ms",
        "limit": f"limit {figure.limit or 0:,.0f}",
        "tflops": f"{_number(figure.tflops or 0)} TFLOP/s",
        "extra_us": f"{figure.extra_us or 0:+,.1f} µs",
    }
    return [
        f"{title} {figure.at:,} tokens" if isinstance(figure.at, int) else f"{title} {figure.at}",
        f"{_number(figure.median)} {figure.unit}",
        str(figure.runs),
        _number(figure.low),
        _number(figure.high),
        size(figure.bytes),
        f"{figure.gb_s:,.1f}",
        f"{figure.percent:.1f}",
        *(words for name, words in beside.items() if getattr(figure, name) is not None),
    ]


def _number(value: float) -> str:
    """Format with at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
