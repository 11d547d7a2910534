"""Tables of docs/models.md: what is compared with what, and the largest difference.

    python -m benchmarks.models_report [--into docs/models.md]

The rows are the registry of adapters, the tensor types and the pre-tokenizers of the code; the
differences are those that `python -m tests.comparisons` has recorded, the speeds of types those of
`python -m benchmarks.gpu_products`, and those of files those of `worker bench`, all in
`benchmarks/results/`. Without --into the tables are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.recorded import (
    DECODE_ROWS,
    PREFILL_ROWS,
    RESULTS,
    ProductSpeeds,
    at,
    read,
    read_products,
    read_rows,
    write_rows,
)
from benchmarks.report import LONG, MIDDLE, NONE, SHORT, put_into, table
from worker.adapters import ADAPTERS
from worker.bench.result import Figure, Result, number
from worker.gpu.layouts import plane_bytes
from worker.quants import QUANT_TYPES, QuantType
from worker.text.pre_tokenizers import PRE_TOKENIZERS

RECORD = RESULTS / "models" / "comparisons.json"
PART = "models"
"""The name of the marked part of the page."""
ARCHITECTURE, TYPE, TOKENIZER = "architecture", "type", "pre-tokenizer"
CPU, EMULATOR = "cpu", "emulator"
PREFILL, DECODE = "prefill", "decode"
LLAMA_CPP, AS_F32 = "llama.cpp", "llama.cpp, weights as F32"
NOT_MEASURED = "not measured"
_NAMES_A_LINE = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison with a reference, recorded by `tests/comparisons.py`."""

    part: str
    name: str
    """The architecture, the tensor type or the pre-tokenizer."""
    model: str
    """The tiny model (`tests/tiny_models.py`) or the case of goldens."""
    device: str
    """cpu, emulator, or the name of a card."""
    reference: str
    """llama.cpp, transformers or tiktoken; on a GPU the phase, compared with the CPU in f32."""
    versions: str
    difference: float
    """The largest one."""
    unit: str
    """nat: of log-probabilities; relative: norm of the logits' difference; strings: other ids."""
    cases: int
    """Log-probabilities, rows of logits or strings compared."""
    test: str
    """The test with this comparison and its bound."""
    date: str = ""
    """The day of the measurement."""

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies a comparison in the record, in the record's order."""
        return self.part, self.name, self.model, self.device, self.reference


def read_record(path: Path = RECORD) -> list[Comparison]:
    """The recorded comparisons. Exits with one sentence if the file has none."""
    return read_rows(path, "comparisons", lambda each: Comparison(**each), "tests.comparisons")


def write_record(path: Path, comparisons: Iterable[Comparison], date: str) -> None:
    """Write comparisons, the last one of each key; those without a date get this one."""
    by_key = {each.key: each if each.date else replace(each, date=date) for each in comparisons}
    write_rows(path, "comparisons", (asdict(by_key[key]) for key in sorted(by_key)))


def report(record: Sequence[Comparison], results: Sequence[Result], products: Sequence[ProductSpeeds] = ()) -> str:
    """Return all tables of the page."""
    parts = (_architectures(record), _types(record), _products(products), _tokenizers(record), _speeds(results))
    return "\n\n".join(parts)


def _architectures(record: Sequence[Comparison]) -> str:
    rows: list[Sequence[str]] = []
    for name in ADAPTERS:
        here = [each for each in record if (each.part, each.name) == (ARCHITECTURE, name)]
        references = list(dict.fromkeys(each.reference for each in here if each.device == CPU)) or [""]
        for row, reference in enumerate(references):
            same = [each for each in here if (each.device, each.reference) == (CPU, reference)]
            cpu = [reference, _models(same), _largest(same)] if same else [NOT_MEASURED, "", ""]
            gpu = _gpu(here) if row == 0 else ["", "", ""]
            rows.append((f"`{name}`" if row == 0 else "", *cpu, *gpu))
    heads = ("architecture", "CPU against", "tiny models", "largest difference", *_GPU_HEADS)
    return f"## Architectures\n\n{table(heads, rows, left=3)}\n\n{_tests(record, ARCHITECTURE)}"


def _types(record: Sequence[Comparison]) -> str:
    rows = []
    for kind in QUANT_TYPES:
        here = [each for each in record if (each.part, each.name) == (TYPE, kind.name)]
        bits = (f"{_bits(kind):.4g}", f"{_bits_on_gpu(kind):.4g}")
        rows.append((f"`{kind.name}`", *bits, *(_of(here, each) for each in (AS_F32, LLAMA_CPP)), *_gpu(here)))
    heads = ("type", "bits a weight", "on a GPU", "CPU against llama.cpp, weights as F32", "as they are", *_GPU_HEADS)
    return f"## Tensor types\n\n{table(heads, rows, left=1)}\n\n{_tests(record, TYPE)}"


def _products(products: Sequence[ProductSpeeds]) -> str:
    rows: list[Sequence[str]] = []
    for kind in QUANT_TYPES:
        measured = [each for each in products if each.type == kind.name]
        title, on_gpu = f"`{kind.name}`", f"{_bits_on_gpu(kind):.4g}"
        rows += [(title if row == 0 else "", on_gpu, *_speed(each)) for row, each in enumerate(measured)]
        if not measured:
            rows.append((title, on_gpu, NOT_MEASURED, *[""] * 9))
    heads = ("type", "bits a weight on a GPU", "matrix", "MB", "decode of 1 row, µs", "GB/s", "of bandwidth",
             *(f"{tokens} rows, µs" for tokens in DECODE_ROWS[1:]), f"prefill of {PREFILL_ROWS:,}, TFLOP/s",
             "device", "commit")  # fmt: skip
    return f"## Speed of tensor types\n\n{table(heads, rows, left=1)}"


def _speed(each: ProductSpeeds) -> list[str]:
    """Matrix, bytes, speeds, device and commit."""
    one, *others = (at(each, DECODE, tokens) for tokens in DECODE_ROWS)
    prefill = at(each, PREFILL, PREFILL_ROWS)
    read_by_one = [NONE] * 4
    if one is not None:
        read_by_one = [f"{one.bytes / 1e6:.1f}", number(one.median), f"{one.gb_s:,.0f}", f"{one.percent:.0f} %"]
    times = [NONE if figure is None else number(figure.median) for figure in others]
    rate = NONE if prefill is None or prefill.tflops is None else number(prefill.tflops)
    return [f"{each.rows:,} × {each.cols:,}", *read_by_one, *times, rate, each.device, each.commit or NONE]


def _tokenizers(record: Sequence[Comparison]) -> str:
    found = {each.name: each for each in record if each.part == TOKENIZER}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in PRE_TOKENIZERS:
        each = found.get(name)
        facts: tuple[str, ...] = (NOT_MEASURED, "", "")
        if each is not None:
            facts = (each.reference, f"{each.cases}", f"{each.difference:.0f}")
        groups.setdefault(facts, []).append(f"`{name}`")
    rows = []
    for facts, names in groups.items():
        lines = [names[start : start + _NAMES_A_LINE] for start in range(0, len(names), _NAMES_A_LINE)]
        rows += [(", ".join(line), *facts) for line in lines]
    heads = ("`tokenizer.ggml.pre`", "against", "strings each", "with other ids")
    return f"## Pre-tokenizers\n\n{table(heads, rows)}\n\n{_tests(record, TOKENIZER)}"


def _speeds(results: Sequence[Result]) -> str:
    rows = []
    for name in ADAPTERS:
        measured = [result for result in results if result.model.architecture == name]
        for row, result in enumerate(measured):
            figures = (at(result, "decode", SHORT), at(result, "decode", LONG), at(result, "prefill", MIDDLE))
            start = at(result, "start", "ready")
            title = f"`{name}`" if row == 0 else ""
            facts = (NONE if start is None else number(start.median), result.commit or NONE)
            rows.append((title, result.model.file, result.machine.device, *map(_beside_limit, figures), *facts))
        if not measured:
            rows.append((f"`{name}`", NOT_MEASURED, "", "", "", "", "", ""))
    heads = ("architecture", "file", "device", f"decode after {SHORT}", f"after {LONG:,}", f"prefill of {MIDDLE:,}",
             "start to ready, s", "commit")  # fmt: skip
    about = "Tokens/s of one sequence, of the limit."
    return f"## Speed of full-size files\n\n{about}\n\n{table(heads, rows, left=3)}"


def _beside_limit(figure: Figure | None) -> str:
    """The speed, of the limit if the result has one."""
    if figure is None:
        return NONE
    return number(figure.median) + (f" of {number(figure.limit)}" if figure.limit else "")


_GPU_HEADS = ("GPU against CPU, prefill", "decode", "GPU")
_ELEMENTS = 256


def _gpu(here: Sequence[Comparison]) -> list[str]:
    """Prefill, decode and device: a card's figures if there are any, else the emulator's."""
    devices = dict.fromkeys(each.device for each in here if each.device != CPU)
    device = next((each for each in devices if each != EMULATOR), EMULATOR if devices else "")
    if not device:
        return [NOT_MEASURED, "", ""]
    phases = (
        [each for each in here if (each.device, each.reference) == (device, phase)] for phase in (PREFILL, DECODE)
    )
    prefill, decode = (_largest(each) if each else NOT_MEASURED for each in phases)
    return [prefill, decode, device]


def _of(here: Sequence[Comparison], reference: str) -> str:
    """The CPU's largest difference from a reference."""
    same = [each for each in here if (each.device, each.reference) == (CPU, reference)]
    return _largest(same) if same else NOT_MEASURED


def _largest(same: Sequence[Comparison]) -> str:
    """The largest difference, with its unit where that is not relative."""
    worst = max(same, key=lambda each: each.difference)
    return f"{worst.difference:.1e}" + (f" {worst.unit}" if worst.unit != "relative" else "")


def _models(same: Sequence[Comparison]) -> str:
    return ", ".join(each.model for each in same)


def _bits(kind: QuantType) -> float:
    """Bits of a weight in the file."""
    return 8 * kind.block_bytes / kind.block_size


def _bits_on_gpu(kind: QuantType) -> float:
    """Bits of a weight in the layout of VRAM."""
    return 8 * sum(plane_bytes(kind, _ELEMENTS)) / _ELEMENTS


def _tests(record: Sequence[Comparison], part: str) -> str:
    """The tests of a part: what they compare, and the names of architectures."""
    tests: dict[tuple[str, str], dict[str, None]] = {}
    for each in record:
        if each.part == part:
            what = each.versions if each.device == CPU else f"the GPU with the CPU, {each.device}"
            tests.setdefault((each.test, what), {})[f"`{each.name}`"] = None
    lines = []
    for (test, what), names in sorted(tests.items()):
        of = f": {', '.join(names)}" if part == ARCHITECTURE else ""
        lines.append(f"- `{test}`, {what}{of}")
    return "\n".join(lines)


def results_of(folder: Path = RESULTS) -> list[Result]:
    """The results of `worker bench` in the folder, and those of the architectures without goals."""
    return read([*sorted(folder.glob("*.json")), *sorted((folder / "architectures").glob("*.json"))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write into this page instead of stdout")
    chosen = parser.parse_args()
    text = report(read_record(), results_of(), read_products())
    if chosen.into:
        put_into(chosen.into, text, PART)
    else:
        print(text)


if __name__ == "__main__":
    main()
