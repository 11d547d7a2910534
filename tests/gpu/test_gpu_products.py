"""benchmarks/gpu_products.py with a tiny matrix: what is launched, checked and recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import gpu_products
from benchmarks.gpu_products import ProductBench, Sizes, line, measure, requirements
from benchmarks.recorded import ProductSpeeds, read_products
from worker.bench.result import Bandwidth
from worker.quants import F16, IQ2_S, IQ2_XS

TINY = Sizes(rows=96, cols=256, prefill_rows=16, copies_bytes=1, launches=2, runs=2)
GB_S = 100.0
PER_WEIGHT = {"F16": 2, "IQ2_XS": 106 / 256}
"""Bytes in VRAM: IQ2 has 106 for 256 weights."""


@pytest.mark.parametrize("kind", [F16, IQ2_XS], ids=lambda kind: kind.name)
def test_each_product_is_timed_beside_its_bytes(kernels, kind):
    figures = measure(kernels, kind, TINY, Bandwidth(10**9, [1e9 / (GB_S * 1e9)]))
    assert {phase: [each.at for each in group] for phase, group in figures.items()} == {
        "decode": [1, 8, 64],
        "prefill": [16],
    }
    for each in (*figures["decode"], *figures["prefill"]):
        assert 0 < each.low <= each.median <= each.high
        assert (each.unit, each.runs) == ("µs", 2)
        assert each.bytes == 96 * 256 * PER_WEIGHT[kind.name]
        assert each.gb_s == pytest.approx(each.bytes / each.median / 1e3)
        assert each.percent == pytest.approx(100 * each.gb_s / GB_S)
        assert each.tflops == pytest.approx(2 * 96 * 256 * each.at / each.median / 1e6)


def test_a_graph_reads_whole_passes_over_copies_at_different_addresses(kernels, monkeypatch):
    bench = ProductBench(kernels, F16, replace(TINY, copies_bytes=5 * 96 * 256 * 2), Bandwidth(1, [1.0]))
    launched, product = [], gpu_products.product

    def listed(*args):
        multiply = product(*args)
        return lambda linear: launched.append(linear) or multiply(linear)

    monkeypatch.setattr(gpu_products, "product", listed)
    bench.figure("decode", 1)
    addresses = [linear.weight.data.addresses()[0] for linear in launched[1:]]  # the first is checked
    assert len(addresses) == len(set(addresses)) == 5


@pytest.mark.parametrize(("phase", "wrong"), [("decode", "DecodeProducts"), ("prefill", "matmul")])
def test_a_wrong_product_is_not_timed(kernels, monkeypatch, phase, wrong):
    class Twice:
        """Multiplies by a matrix whose upper half is its lower half."""

        def __init__(self, launcher, pool, max_shared=None):
            self._made = made(launcher, pool, max_shared)

        def multiply(self, x, norm, linears):
            (y,) = self._made.multiply(x, norm, linears)
            y[:, :48] = y[:, 48:]
            return (y,)

    def twice(launcher, pool, x, linear):
        y = made(launcher, pool, x, linear)
        y[:, :48] = y[:, 48:]
        return y

    made = getattr(gpu_products, wrong)
    monkeypatch.setattr(gpu_products, wrong, Twice if phase == "decode" else twice)
    bench = ProductBench(kernels, F16, TINY, Bandwidth(1, [1.0]))
    with pytest.raises(SystemExit, match=rf"^F16, {phase} of 16 rows: relative error .*, not timed$"):
        bench.figure(phase, 16)


def test_the_kernels_are_those_that_a_measurement_launches(kernels):
    got = []

    class Listed:
        wgmma = kernels.wgmma

        def get(self, file, expression):
            got.append((file, expression))
            return kernels.get(file, expression)

    measure(Listed(), IQ2_XS, TINY, Bandwidth(1, [1.0]))
    expected = {("repack.cu", "repack<IQ2_XS>"), *requirements(IQ2_XS, TINY, 227 << 10, wgmma=kernels.wgmma).kernels}
    assert set(got) == expected


def test_a_run_records_each_type_with_the_card_and_the_commit(kernels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_products, "Kernels", lambda cache: kernels)
    monkeypatch.setattr(gpu_products, "read_seconds", lambda cache, nbytes, runs: (nbytes, [nbytes / (GB_S * 1e9)]))
    monkeypatch.setattr(gpu_products.upload, "INSTANTIATIONS", ())  # those of all types take a minute to emulate
    record = tmp_path / "products.json"
    gpu_products.run([IQ2_XS], TINY, record, "older")
    gpu_products.run([IQ2_XS, IQ2_S], TINY, record, "c0ffee")
    found = read_products(record)
    assert [(each.type, each.rows, each.cols, each.commit) for each in found] == [
        ("IQ2_S", 96, 256, "c0ffee"),
        ("IQ2_XS", 96, 256, "c0ffee"),
    ]
    assert [each.bandwidth_gb_s for each in found] == [pytest.approx(GB_S)] * 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{found[0].device}, 100 GB/s; matrices of 96 × 256"
    assert printed[-2:] == [line(each) for each in reversed(found)]


def test_a_line_has_the_speeds_of_all_products():
    def figure(tokens, seconds, **more):
        return Bandwidth(3000, [1e-9]).figure(tokens, "µs", lambda each: 1e6 * each, [seconds], 49_000_000, **more)

    decode = [figure(1, 21e-6), figure(8, 28e-6), figure(64, 84e-6)]
    figures = {"decode": decode, "prefill": [figure(1024, 2e-4, tflops=512.3)]}
    facts = {"device": "Card", "date": "2026-12-01", "commit": None, "bandwidth_gb_s": 3000.0}
    found = line(ProductSpeeds(type="F16", rows=96, cols=256, figures=figures, **facts))
    expected = "F16 49.0 MB 1 row 21 µs 2,333 GB/s 78 % 8 rows 28 µs 64 rows 84 µs 1,024 rows 512 TFLOP/s"
    assert " ".join(found.split()) == expected
