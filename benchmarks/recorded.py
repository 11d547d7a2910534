"""What `worker bench --json` wrote, read back for report and plot. Its fields are `worker/bench/result.py`'s."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from worker.bench.result import SCHEMA, Figure, Machine, ModelFacts, Result


def read(paths: Iterable[Path]) -> list[Result]:
    """The result in each file. Ends the program with a sentence where one is no such file."""
    return [_read(path) for path in paths]


def stem(result: Result) -> str:
    """The model's short name: its file's, without the ending."""
    return result.model.file.removesuffix(".gguf")


def at(result: Result, name: str, where: int | str) -> Figure | None:
    """The figure of that name there; None where it was not measured."""
    return next((figure for figure in result.figures.get(name, ()) if figure.at == where), None)


def _read(path: Path) -> Result:
    try:
        given: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if given["schema"] != SCHEMA:
            raise SystemExit(f"{path}: schema {given['schema']}; expected {SCHEMA}: measure again")
        figures = {name: [Figure(**each) for each in several] for name, several in given.pop("figures").items()}
        machine, model = Machine(**given.pop("machine")), ModelFacts(**given.pop("model"))
        return Result(machine=machine, model=model, figures=figures, **given)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path}: {error}; expected what `worker bench MODEL --json` prints") from None
