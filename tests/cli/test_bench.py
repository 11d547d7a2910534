"""`worker bench` on tiny models: both output formats, and consistent figures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from benchmarks.recorded import read
from worker import runtime
from worker.bench.bench import SIZES, Sizes, run_throughput
from worker.bench.timing import Jobs, timed_jobs
from worker.bench.traffic import Traffic
from worker.cli import command_line
from worker.config import ModelSection, load_settings
from worker.cpu.backend import CpuBackend
from worker.errors import ConfigInvalid, Internal
from worker.gguf_file import GgufFile

MIDDLE = SIZES["cpu"].tokens // 2


def worker_bench(*arguments):
    command = [sys.executable, "-m", "worker", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def stdout(tiny):
    done = worker_bench(tiny("gpt-oss"), "--json", "--context", 160, "--commit", "abc1234")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def result(stdout):
    (line,) = stdout.splitlines()
    return json.loads(line)


def figures_of(result):
    return [figure for figures in result["figures"].values() for figure in figures]


def test_json_is_one_line_with_the_machine_the_model_and_the_commit(result, tiny):
    with GgufFile.open(tiny("gpt-oss")) as file:
        assert result["model"]["fingerprint"] == file.fingerprint()
        assert result["model"]["file_bytes"] == file.tensor_bytes
    assert (result["model"]["file"], result["model"]["context"]) == ("gpt-oss.gguf", 160)
    assert (result["machine"]["backend"], result["machine"]["cupy"]) == ("cpu", None)
    assert (result["commit"], result["schema"]) == ("abc1234", 1)


def test_every_length_within_the_context_and_every_measurement_is_reported(result):
    where = {name: [figure["at"] for figure in figures] for name, figures in result["figures"].items()}
    assert where["decode"] == where["prefill"] == [32, 128]
    assert where["first_token"] == where["answer"] == ["engine", "server"]
    assert where["load"] == ["first", "again"]
    assert where["start"] == ["ready"]
    assert where["sampler"][0] == "greedy"
    assert len(where["sampler"]) == 4


def test_figures_are_medians_of_at_least_five_runs_or_three_starts_with_their_extremes(result):
    for figure in figures_of(result):
        assert 0 < figure["low"] <= figure["median"] <= figure["high"]
        assert figure["runs"] >= {"first": 1, "ready": 3}.get(figure["at"], 5)
    (start,), (_, again) = result["figures"]["start"], result["figures"]["load"]
    assert start["low"] > again["low"], "a start includes a load"
    for figure in result["figures"]["first_token"]:
        assert figure["runs"] == 40
        assert figure["low"] <= figure["p95"] <= figure["high"]


def test_gb_s_and_percent_follow_from_the_bytes_and_the_measured_bandwidth(result):
    bandwidth = result["bandwidth_gb_s"]
    assert result["bandwidth_low"] <= bandwidth <= result["bandwidth_high"]
    for figure in figures_of(result):
        assert figure["percent"] == pytest.approx(100 * figure["gb_s"] / bandwidth)
    for figure in result["figures"]["decode"] + result["figures"]["prefill"]:
        assert figure["percent"] == pytest.approx(100 * figure["median"] / figure["limit"])
    for figure in result["figures"]["load"]:
        assert figure["gb_s"] == pytest.approx(figure["bytes"] / figure["median"] / 1e9)
    engine, served = (figure["median"] for figure in result["figures"]["answer"])
    assert result["server_share"] == pytest.approx(served / engine)


def test_bytes_count_the_selected_experts_with_the_sizes_of_the_backend(result, tiny):
    backend = CpuBackend()
    with GgufFile.open(tiny("gpt-oss")) as file:
        traffic = Traffic(runtime.plan(file, ModelSection(context=160), backend), backend.weight_bytes)
    for figure in result["figures"]["decode"]:
        assert figure["bytes"] == traffic.token_bytes(figure["at"] + MIDDLE) < result["model"]["weight_bytes"]
    for figure in result["figures"]["prefill"]:
        assert figure["bytes"] == traffic.prompt_bytes(figure["at"])


def test_recorded_read_returns_the_printed_result(stdout, result, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(stdout)
    (again,) = read([path])
    assert again.to_json() == result


@pytest.fixture
def short(monkeypatch):
    """Measure short prompts and answers."""
    sizes = Sizes(16 << 20, (16, 1 << 20), tokens=4, first=16, answer=4, first_tokens=3, starts=1, together=3)
    monkeypatch.setitem(SIZES, "cpu", sizes)


def test_several_sequences_are_measured_beside_their_floor(tiny, short):
    settings = load_settings(flags={"engine.max_running": 9, "engine.backend": "cpu"})
    result = run_throughput(tiny("gpt-oss"), settings, lambda _: None)
    figures = result.figures["throughput"]
    assert [figure.at for figure in figures] == [1, 8, 9]
    assert (result.model.file, result.server_share) == ("gpt-oss.gguf", None)
    backend = CpuBackend()
    with GgufFile.open(tiny("gpt-oss")) as file:
        traffic = Traffic(runtime.plan(file, ModelSection(), backend), backend.weight_bytes)
    for figure in figures:
        assert 16 + 1 + 1 <= figure.context <= 16 + 3 + figure.at
        assert figure.bytes == traffic.step_bytes(figure.at, figure.context)
        floor_s = traffic.step_floor_s(figure.at, figure.context, 1e9 * result.bandwidth_gb_s)
        assert figure.floor == pytest.approx(figure.at / floor_s)
        assert figure.floor_percent == pytest.approx(100 * figure.step_us**-1 * 1e6 * floor_s)


def test_too_few_kv_blocks_for_the_sequences_are_one_sentence(tiny, short):
    flags = {"engine.max_running": 200, "engine.backend": "cpu", "engine.kv_memory": 1 << 20}
    with pytest.raises(ConfigInvalid, match=r"200 sequences .* need 3,000 KV blocks and there are \d+; pass a lower"):
        run_throughput(tiny("qwen2"), load_settings(flags=flags), lambda _: None)


def test_without_json_it_prints_tables(tiny, short):
    arguments = ["bench", str(tiny("qwen2")), "--backend", "cpu", "--max-running", "2"]
    done = CliRunner().invoke(command_line("bench"), arguments)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    for title in (
        "decode at 16 tokens",
        "prefill of 16 tokens",
        "first token, server",
        "load, again",
        "start to ready",
        "long answer",
    ):
        (found, *_) = [line for line in lines if line.startswith(title)]
        assert "B " in found  # the bytes moved
    assert "1,048,576" not in done.stdout
    (head,) = [number for number, line in enumerate(lines) if line.startswith("sequences ")]
    assert [line.split()[0] for line in lines[head + 1 : head + 3]] == ["1", "2"]
    for title in ("tokens/s in all", "floor", "% of floor", "µs a step"):
        assert title in lines[head]
    assert lines[-1].startswith("Through the server a job runs at ")


def test_a_missing_file_is_one_sentence_and_exit_code_1(tmp_path):
    done = worker_bench(tmp_path / "nothing.gguf", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("worker: MODEL_LOAD_FAILED: ")
    assert done.stderr.count("\n") == 1


def test_a_too_short_context_is_an_error_with_the_required_length(tiny):
    done = worker_bench(tiny("qwen2"), "--context", 48, "--backend", "cpu")
    assert done.returncode == 4
    assert "at least 64" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_context_too_short_for_several_sequences_is_an_error_with_the_required_length(tiny):
    done = worker_bench(tiny("qwen2"), "--context", 64, "--backend", "cpu", "--max-running", 9)
    assert done.returncode == 4
    assert "at least 65" in done.stderr


def test_wrong_usage_is_exit_code_2():
    assert worker_bench().returncode == 2


def test_a_worker_process_that_does_not_start_fails_the_benchmark_with_its_log_line(tmp_path):
    from worker.embedded import embedded_server

    jobs = Jobs(prompt=4, first_tokens=1, answers=1, tokens=2)
    with embedded_server() as url, pytest.raises(Internal, match=r"did not become ready.*MODEL_LOAD_FAILED"):
        timed_jobs(tmp_path / "nothing.gguf", url, ["--backend", "cpu"], jobs, lambda n: [1] * n)
