"""docs/models.md: a row for all that the code has, and the page that the record gives."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_products
from benchmarks.models_report import (
    ARCHITECTURE,
    AS_F32,
    CPU,
    DECODE,
    EMULATOR,
    LLAMA_CPP,
    NOT_MEASURED,
    PREFILL,
    TOKENIZER,
    TYPE,
    Comparison,
    read_record,
    report,
    results_of,
    write_record,
)
from benchmarks.recorded import ProductSpeeds, read_products, write_products
from tests.adapters.gelu import F16_BOUND
from tests.tiny_models import TINY
from worker.adapters import ADAPTERS
from worker.bench.result import Bandwidth
from worker.quants import QUANT_TYPES
from worker.text.pre_tokenizers import PRE_TOKENIZERS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
MEASURE = "run `python -m tests.comparisons --missing`, then `python -m benchmarks.models_report --into docs/models.md`"


@pytest.fixture(scope="module")
def record():
    return read_record()


def names(record, part, device=CPU):
    return {each.name for each in record if each.part == part and each.device == device}


def test_the_page_is_what_the_record_and_the_code_give(record):
    marked = re.search(r"<!-- models: begin -->\n\n(.*)\n\n<!-- models: end -->", PAGE.read_text("utf-8"), re.DOTALL)
    assert marked, "no marks"
    assert marked[1] == report(record, results_of(), read_products()), (
        "run `python -m benchmarks.models_report --into docs/models.md`"
    )


def test_everything_that_the_code_has_was_compared_on_the_cpu(record):
    assert set(ADAPTERS) - names(record, ARCHITECTURE) == set(), MEASURE
    assert {kind.name for kind in QUANT_TYPES} - names(record, TYPE) == set(), MEASURE
    assert set(PRE_TOKENIZERS) - names(record, TOKENIZER) == set(), MEASURE


def test_every_tiny_model_was_compared(record):
    models = {each.model for each in record if each.part == ARCHITECTURE and each.device == CPU}
    assert set(TINY) - models == set(), MEASURE


def test_the_record_has_nothing_that_the_code_has_not(record):
    assert names(record, ARCHITECTURE) <= set(ADAPTERS)
    assert names(record, TYPE) <= {kind.name for kind in QUANT_TYPES}
    assert names(record, TOKENIZER) <= set(PRE_TOKENIZERS)
    assert {each.type for each in read_products()} <= {kind.name for kind in QUANT_TYPES}


def test_recorded_differences_are_within_the_bounds_of_the_tests(record):
    """On a GPU at most twice those: a near tie may send a token to another expert."""
    bounds = {LLAMA_CPP: 1e-3, "transformers": 2e-5, AS_F32: 1e-3, PREFILL: 5e-2, DECODE: 1e-1}
    for each in record:
        bound = 0 if each.part == TOKENIZER else bounds[each.reference]
        if (each.part, each.reference) == (TYPE, LLAMA_CPP):
            bound = 0.5  # llama.cpp rounds activations to 8 bits
        if each.name in ("gemma3", "gemma4") and each.reference == LLAMA_CPP:
            bound = F16_BOUND
        assert each.difference <= bound, each


def test_every_named_test_exists_and_has_a_test(record):
    for test in {each.test for each in record}:
        assert "\ndef test_" in (ROOT / test).read_text("utf-8"), test


def some(part, name, device, reference, difference, **fields):
    known = {
        "model": "tiny",
        "versions": "v1",
        "unit": "relative",
        "cases": 9,
        "test": "tests/a.py",
        "date": "2026-11-26",
    }
    return Comparison(part=part, name=name, device=device, reference=reference, difference=difference, **known | fields)


def rows_of(text, first):
    return [line for line in text.splitlines() if line.startswith(f"| {first} ")]


def test_a_row_has_the_largest_difference_of_its_reference():
    found = [some(ARCHITECTURE, "llama", CPU, LLAMA_CPP, each, model=f"m{each}", unit="nat") for each in (1e-5, 3e-4)]
    (row,) = rows_of(report(found, []).partition("## Tensor types")[0], "`llama`")
    assert row == "| `llama` | llama.cpp | m1e-05, m0.0003 | 3.0e-04 nat | not measured |  |  |"


def test_figures_of_a_card_replace_those_of_the_emulator():
    found = [some(TYPE, "Q8_0", device, phase, 1e-3) for device in (EMULATOR, "Card") for phase in (PREFILL, DECODE)]
    row, _ = rows_of(report(found, []), "`Q8_0`")
    assert row.endswith("| 1.0e-03 | 1.0e-03 | Card |")
    row, _ = rows_of(report(found[:2], []), "`Q8_0`")
    assert row.endswith("| emulator |")


def test_what_was_not_measured_is_a_row_that_states_it():
    text = report([], [])
    for name in (*ADAPTERS, *(kind.name for kind in QUANT_TYPES)):
        (row, *_) = rows_of(text, f"`{name}`")
        assert NOT_MEASURED in row
    assert all(f"`{name}`" in text for name in PRE_TOKENIZERS)


def test_a_speed_is_that_of_the_recorded_result():
    results = results_of()
    architectures = {result.model.architecture for result in results}
    text = report([], results).partition("## Speed")[2]
    for name in ADAPTERS:
        (row, *_) = rows_of(text, f"`{name}`")
        assert (NOT_MEASURED in row) == (name not in architectures)
    (row,) = rows_of(text, "`qwen2`")
    qwen2 = next(result for result in results if result.model.architecture == "qwen2")
    decode = next(figure for figure in qwen2.figures["decode"] if figure.at == 128)
    assert f"| {decode.median:,.0f} of {decode.limit:,.0f} |" in row


def test_a_speed_of_prefill_and_a_start_are_those_of_the_recorded_result():
    qwen2 = next(result for result in results_of() if result.model.architecture == "qwen2")
    prefill = next(figure for figure in qwen2.figures["prefill"] if figure.at == 2048)
    start = replace(prefill, at="ready", unit="s", median=1.234)
    figures = {"prefill": [replace(prefill, median=1000.0, limit=2500.0)], "start": [start]}
    (row,) = rows_of(report([], [replace(qwen2, figures=figures)]).partition("## Speed")[2], "`qwen2`")
    assert row.split(" | ")[3:7] == ["–", "–", "1,000 of 2,500", "1.23"]


def speeds(name, device="Card", us=20.0, **fields):
    """Of a matrix of 36 MB, with a read bandwidth of 3,000 GB/s."""

    def figure(tokens, seconds, **more):
        return Bandwidth(3000, [1e-9]).figure(tokens, "µs", lambda each: 1e6 * each, [seconds], 36_000_000, **more)

    figures = {
        "decode": [figure(1, us / 1e6), figure(8, 1.5 * us / 1e6), figure(64, 3 * us / 1e6)],
        "prefill": [figure(1024, 2e-4, tflops=600.4)],
    }
    known = {"rows": 16000, "cols": 4096, "date": "2026-12-01", "commit": "c0ffee", "bandwidth_gb_s": 3000.0}
    return ProductSpeeds(type=name, device=device, figures=figures, **known | fields)


def speed_rows(products):
    """The table of speeds by type, without its head."""
    part = report([], [], products).partition("## Speed of tensor types")[2].partition("##")[0]
    return part.strip().splitlines()[2:]


def test_the_speeds_of_a_type_are_beside_its_bytes_on_the_gpu():
    rows = speed_rows([speeds("IQ2_S"), speeds("IQ2_S", "Other", us=40.0, commit=None)])
    at = next(i for i, row in enumerate(rows) if row.startswith("| `IQ2_S` "))
    matrix, batches = "3.312 | 16,000 × 4,096 | 36.0", "30 | 60 | 600"
    assert rows[at] == f"| `IQ2_S` | {matrix} | 20 | 1,800 | 60 % | {batches} | Card | c0ffee |"
    assert rows[at + 1] == f"|  | {matrix} | 40 | 900 | 30 % | 60 | 120 | 600 | Other | – |"
    assert len(rows) == len(QUANT_TYPES) + 1
    assert sum(NOT_MEASURED in row for row in rows) == len(QUANT_TYPES) - 1


def test_every_row_of_speeds_has_a_cell_for_each_head():
    text = report([], [], [speeds("F16")]).partition("## Speed of tensor types")[2].partition("##")[0]
    assert len({line.count("|") for line in text.strip().splitlines()}) == 1


def test_speeds_replace_the_recorded_ones_of_their_key(tmp_path):
    path = tmp_path / "products.json"
    assert read_products(path) == []
    write_products(path, [speeds("F16"), speeds("F16", "Other"), speeds("F16", rows=9), speeds("F16", us=50.0)])
    assert read_products(path) == [speeds("F16", us=50.0), speeds("F16", rows=9), speeds("F16", "Other")]


def test_a_measurement_without_a_gpu_ends_with_one_sentence(monkeypatch):
    monkeypatch.setattr(gpu_products, "why_no_gpu", lambda: "CuPy is not installed here")
    monkeypatch.setattr("sys.argv", ["gpu_products", "--only", "F16"])
    with pytest.raises(SystemExit, match=r"^the speed of products needs a GPU: CuPy is not installed here$"):
        gpu_products.main()


@pytest.mark.parametrize("shape", [("0", "256"), ("64", "100")])
def test_a_measurement_of_a_shape_that_a_type_cannot_have_is_refused(shape):
    command = [sys.executable, "-m", "benchmarks.gpu_products", "--shape", *shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--shape {' '.join(shape)}: expected rows, and columns that are a multiple of 256" in done.stderr


def test_a_comparison_replaces_the_recorded_one_of_its_key(tmp_path):
    path = tmp_path / "models.json"
    old, other = some(TYPE, "F32", CPU, LLAMA_CPP, 0.5), some(TYPE, "F16", CPU, LLAMA_CPP, 0.25)
    new = replace(old, difference=0.125, date="")
    write_record(path, [old, other, new], "2026-11-27")
    assert read_record(path) == [other, replace(new, date="2026-11-27")]


@pytest.mark.parametrize(
    "content", ["", "{}", '{"schema": 0, "comparisons": []}', '{"schema": 1, "comparisons": [{}]}']
)
def test_another_file_ends_the_report_with_one_sentence(content, tmp_path):
    path = tmp_path / "models.json"
    path.write_text(content)
    for each in (read_record, read_products):
        with pytest.raises(SystemExit, match="expected"):
            each(path)
