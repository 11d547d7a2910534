"""The commands as subprocesses: output, exit codes, one sentence per error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from worker.cli.console import size


def worker(*arguments, stdin=None):
    command = [sys.executable, "-m", "worker", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def events(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_generate_writes_text_to_stdout_and_statistics_to_stderr(tiny):
    done = worker("generate", tiny("qwen2"), "hello", "--max-tokens", 8, "--seed", 1, "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "8 generated" in done.stderr
    again = worker("generate", tiny("qwen2"), "hello", "--max-tokens", 8, "--seed", 1, "--ignore-eos")
    assert again.stdout == done.stdout


def test_generate_json_prints_one_event_per_line_and_ends_with_end(tiny):
    done = worker(
        *("generate", tiny("llama"), "--prompt-tokens", "1,2,3", "--max-tokens", 5, "--temperature", 0),
        *("--logprobs", 3, "--ignore-eos", "--json"),
    )
    first, *tokens, last = events(done)
    assert first["event"] == "started"
    assert first["prompt_tokens"] == 3
    assert [t["event"] for t in tokens] == ["token"] * 5
    assert [t["i"] for t in tokens] == [0, 1, 2, 3, 4]
    for token in tokens:
        logprobs = [logprob for _, logprob in token["top"]]
        assert logprobs == sorted(logprobs, reverse=True)
        assert token["top"][0] == [token["id"], token["logprob"]]  # greedy
    assert (last["event"], last["finish_reason"], last["tokens_out"]) == ("end", "length", 5)


def test_generate_follows_a_response_format(tiny):
    form = '{"type": "choice", "choice": ["hello", "world"]}'
    done = worker("generate", tiny("qwen2"), "say", "--response-format", form)
    assert (done.returncode, done.stdout.strip() in ("hello", "world")) == (0, True)
    form = '{"type": "json_schema", "json_schema": {"schema": {"not": {}}}}'
    refused = worker("generate", tiny("qwen2"), "say", "--response-format", form)
    assert refused.returncode == 3
    assert "response_format.json_schema.schema.not: not supported" in refused.stderr


def test_generate_without_logprobs_omits_them(tiny):
    tokens = events(worker("generate", tiny("llama"), "x", "--max-tokens", 2, "--json", "--ignore-eos"))[1:-1]
    assert all(set(token) == {"event", "i", "id", "t", "channel"} for token in tokens)


def test_a_system_message_is_in_the_prompt_of_a_template_without_that_role(tiny):
    def prompt_tokens(*system):
        done = worker("generate", tiny("phi3"), "hi", "--chat", *system, "--max-tokens", 1, "--json")
        return events(done)[0]["prompt_tokens"]

    merged = json.loads(worker("tokenize", tiny("phi3"), "Be brief.\nhi", "--chat", "--json").stdout)["ids"]
    assert prompt_tokens("--system", "Be brief.") == len(merged) > prompt_tokens()


def test_generate_chat_uses_the_template(tiny):
    started = events(worker("generate", tiny("qwen2"), "hi", "--chat", "--max-tokens", 1, "--json"))[0]
    counted = json.loads(worker("tokenize", tiny("qwen2"), "hi", "--chat", "--json").stdout)["ids"]
    assert started["prompt_tokens"] == len(counted) > 5


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("x", "--temperature", 3), "temperature"),
        (("x", "--prompt-tokens", "1,2"), "prompt"),
        ((), "prompt"),
        (("x", "--max-tokens", 100000), "max_tokens"),
        (("--prompt-tokens", "1,99999"), "prompt_tokens.1"),
        (("x", "--top-k", 99999), "top_k"),
        (("x", "--stop", ""), "stop.0"),
        (("x", "--logprobs", 21), "logprobs"),
    ],
)
def test_an_invalid_request_is_an_error_event_and_exit_code_3(arguments, field, tiny):
    done = worker("generate", tiny("qwen2"), *arguments, "--json")
    assert done.returncode == 3
    last = events(done)[-1]
    assert (last["event"], last["code"], last["retriable"]) == ("error", "INVALID_REQUEST", False)
    assert field in [error["field"] for error in last["details"]["errors"]]
    plain = worker("generate", tiny("qwen2"), *arguments)
    assert plain.returncode == 3
    assert plain.stderr.count("\n") == 1


def test_a_bad_file_is_one_sentence_and_exit_code_1(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    for command in (("generate", path, "x"), ("inspect", path), ("tokenize", path, "x")):
        done = worker(*command)
        assert done.returncode == 1
        assert done.stderr.startswith("worker: MODEL_LOAD_FAILED: ")
        assert "expected" in done.stderr
        assert "Traceback" not in done.stderr
    assert events(worker("generate", path, "x", "--json"))[-1]["code"] == "MODEL_LOAD_FAILED"


def test_the_error_of_a_model_that_is_not_pulled_names_worker_pull():
    done = worker("inspect", "hf:example/missing/model.gguf")
    assert done.returncode == 1
    assert "worker pull" in done.stderr


def test_wrong_usage_is_exit_code_2(tiny):
    assert worker("generate").returncode == 2
    assert worker("generate", tiny("qwen2"), "--prompt-tokens", "1,x").returncode == 2
    assert worker("nonsense").returncode == 2


def test_invalid_settings_are_exit_code_4(tiny, monkeypatch):
    monkeypatch.setenv("WORKER_ENGINE__PREFILL_CHUNK", "17")
    done = worker("generate", tiny("qwen2"), "x")
    assert done.returncode == 4
    assert "engine.prefill_chunk" in done.stderr


def test_an_unknown_backend_is_named_in_the_error(tiny):
    done = worker("generate", tiny("qwen2"), "x", "--backend", "tpu")
    assert done.returncode == 4
    assert "engine.backend" in done.stderr


def test_tokenize_reads_one_json_string_per_line(tiny):
    lines = ["Hello wörld\n", "", "<|im_start|>"]
    done = worker("tokenize", tiny("qwen2"), "-", "--json", stdin="".join(json.dumps(s) + "\n" for s in lines))
    ids = [line["ids"] for line in events(done)]
    assert ids[1] == []
    one = worker("tokenize", tiny("qwen2"), lines[0], "--json")
    assert events(one) == [{"ids": ids[0]}]
    special = worker("tokenize", tiny("qwen2"), "-", "--json", "--special", stdin=json.dumps(lines[2]) + "\n")
    assert len(events(special)[0]["ids"]) == 1 < len(ids[2])


def test_tokenize_rejects_a_line_that_is_not_a_json_string(tiny):
    done = worker("tokenize", tiny("qwen2"), "-", "--json", stdin='"fine"\n{"not": "a string"}\n')
    assert done.returncode == 3
    assert "line 2" in done.stderr


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt-oss", "llama"])
def test_inspect_reports_contents_memory_and_that_the_model_can_run(name, tiny):
    report = json.loads(worker("inspect", tiny(name), "--json", "--context", 100).stdout)
    assert report["can_run"] is True
    assert report["unused_tensors"] == []
    assert report["kv_bytes"]["100"] == 100 * report["kv_bytes_per_token"]
    needed = report["weight_bytes"] + report["overhead_bytes"] + report["context"] * report["kv_bytes_per_token"]
    assert 0 < needed <= report["available_bytes"]
    assert sum(total["bytes"] for total in report["tensors"].values()) == report["tensor_bytes"]
    assert report["tokenizer"]["end_tokens"]
    assert "yes" in worker("inspect", tiny(name)).stdout


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_inspect_shows_how_keys_and_values_are_stored(kv_type, tiny, monkeypatch):
    monkeypatch.setenv("WORKER_ENGINE__KV_TYPE", kv_type)
    report = json.loads(worker("inspect", tiny("qwen2"), "--json", "--context", 100).stdout)
    assert report["kv_type"] == kv_type
    assert f"({kv_type})" in worker("inspect", tiny("qwen2")).stdout


def test_inspect_reports_why_a_file_cannot_run(tiny, tmp_path):
    broken = tmp_path / "broken.gguf"
    data = tiny("llama").read_bytes()
    broken.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    report = json.loads(worker("inspect", broken, "--json").stdout)
    assert report["can_run"] is False
    assert "blk.0.attn_q.weight" in report["reason"]


def test_inspect_of_an_unreadable_file_prints_a_report_with_exit_code_1(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGML")
    done = worker("inspect", path, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["can_run"] is False


def test_help_shows_the_first_commands():
    done = worker("--help")
    assert "worker pull smollm2" in done.stdout
    for command in ("generate", "tokenize", "inspect", "pull"):
        assert command in done.stdout
        assert worker(command, "--help").returncode == 0


def test_the_help_of_the_gateway_names_every_api():
    shown = worker("gateway", "--help").stdout
    for api in ("chat and text completions", "responses", "files", "batches", "models", "Anthropic's: messages"):
        assert api in shown


def test_sizes_are_formatted_in_powers_of_1000():
    assert [size(n) for n in (0, 999, 1500, 98_362_432, 12e9, 3e12)] == [
        *("0 B", "999 B", "1.5 kB", "98.4 MB", "12.0 GB", "3.0 TB")
    ]


@pytest.mark.parametrize("command", ["run", "generate"])
def test_a_command_is_parsed_before_heavy_packages_are_imported(command):
    heavy = "cupy gguf jinja2 numpy redis rich sentencepiece structlog tokenizers"
    program = (
        f"import sys; from worker.cli import command_line; command_line({command!r});"
        f"print(*sorted(set({heavy!r}.split()) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "\n"
