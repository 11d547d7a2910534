"""Recorded results: those of `worker bench --json`, and the speeds of products by tensor type.

`worker/bench/result.py` defines the fields of a result. `report.py`, `plot.py` and
`models_report.py` show them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from worker.bench.result import SCHEMA, Figure, Machine, ModelFacts, Result, figures_to_json

RESULTS = Path(__file__).parent / "results"
PRODUCTS = RESULTS / "models" / "products.json"
RECORD_SCHEMA = 1
"""Of the records, which grow by a line for each measurement."""
DECODE_ROWS, PREFILL_ROWS = (1, 8, 64), 1024
"""Rows of activations of the recorded products."""
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductSpeeds:
    """Speeds of products with a matrix of one type, measured by `benchmarks/gpu_products.py`."""

    type: str
    rows: int
    cols: int
    """Of the matrix."""
    device: str
    date: str
    commit: str | None
    bandwidth_gb_s: float
    """The read bandwidth measured in the same run."""
    figures: dict[str, list[Figure]]
    """`decode` and `prefill`: µs of a product, by rows of activations, with the matrix's bytes."""

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the speeds in the record, in the record's order."""
        return self.type, self.device, f"{self.rows}x{self.cols}"


def read(paths: Iterable[Path]) -> list[Result]:
    """Return the result in each file. Exits with one sentence if a file contains no result."""
    return [_read(path) for path in paths]


def stem(result: Result) -> str:
    """Return the file name of the model without extension."""
    return result.model.file.removesuffix(".gguf")


def at(result: Result | ProductSpeeds, name: str, where: int | str) -> Figure | None:
    """Return the figure `name` at that length or variant; None if it was not measured."""
    return next((figure for figure in result.figures.get(name, ()) if figure.at == where), None)


def read_products(path: Path = PRODUCTS) -> list[ProductSpeeds]:
    """Return the recorded speeds, none if there is no file. Exits as `read_rows` does."""

    def speeds(fields: Mapping[str, Any]) -> ProductSpeeds:
        return ProductSpeeds(**{**fields, "figures": _figures(fields["figures"])})

    return read_rows(path, "products", speeds, "benchmarks.gpu_products") if path.exists() else []


def write_products(path: Path, products: Iterable[ProductSpeeds]) -> None:
    """Write the speeds, the last ones of each key."""
    by_key = {each.key: asdict(each) | {"figures": figures_to_json(each.figures)} for each in products}
    write_rows(path, "products", (by_key[key] for key in sorted(by_key)))


def read_rows(path: Path, name: str, make: Callable[[Mapping[str, Any]], Row], writer: str) -> list[Row]:
    """Return the rows of a record. Exits with one sentence if the file has none of this schema."""
    try:
        fields = json.loads(path.read_text("utf-8"))
        if fields["schema"] != RECORD_SCHEMA:
            raise SystemExit(f"{path}: schema {fields['schema']}; expected {RECORD_SCHEMA}: measure again")
        return [make(each) for each in fields[name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path}: {error}; expected what `python -m {writer}` writes") from None


def write_rows(path: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a record with a line for each row."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{{"schema": {RECORD_SCHEMA}, "{name}": [\n{lines}\n]}}\n', "utf-8")


def _figures(figures: Mapping[str, Any]) -> dict[str, list[Figure]]:
    return {name: [Figure(**each) for each in group] for name, group in figures.items()}


def _read(path: Path) -> Result:
    try:
        fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if fields["schema"] != SCHEMA:
            raise SystemExit(f"{path}: schema {fields['schema']}; expected {SCHEMA}: measure again")
        figures = _figures(fields.pop("figures"))
        machine, model = Machine(**fields.pop("machine")), ModelFacts(**fields.pop("model"))
        return Result(machine=machine, model=model, figures=figures, **fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path}: {error}; expected what `worker bench MODEL --json` prints") from None
