"""Read results written by `worker bench --json`, for report.py and plot.py.

`worker/bench/result.py` defines the fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from worker.bench.result import SCHEMA, Figure, Machine, ModelFacts, Result


def read(paths: Iterable[Path]) -> list[Result]:
    """Return the result in each file. Exits with one sentence if a file contains no result."""
    return [_read(path) for path in paths]


def stem(result: Result) -> str:
    """Return the file name of the model without extension."""
    return result.model.file.removesuffix(".gguf")


def at(result: Result, name: str, where: int | str) -> Figure | None:
    """Return the figure `name` at that length or variant; None if it was not measured."""
    return next((figure for figure in result.figures.get(name, ()) if figure.at == where), None)


def _read(path: Path) -> Result:
    try:
        fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if fields["schema"] != SCHEMA:
            raise SystemExit(f"{path}: schema {fields['schema']}; expected {SCHEMA}: measure again")
        figures = {name: [Figure(**each) for each in group] for name, group in fields.pop("figures").items()}
        machine, model = Machine(**fields.pop("machine")), ModelFacts(**fields.pop("model"))
        return Result(machine=machine, model=model, figures=figures, **fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path}: {error}; expected what `worker bench MODEL --json` prints") from None
