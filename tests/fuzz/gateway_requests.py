"""Bodies and headers of the gateway's requests to the fields of jobs, or to an error of status 4xx."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.source import NUMBERS, TEXTS, Source
from worker.errors import InvalidRequest
from worker.gateway.batch_lines import Mistake, Outcome, parse_line, result_line
from worker.gateway.batches import BatchRequest
from worker.gateway.chat import ChatRequest
from worker.gateway.completions import CompletionRequest
from worker.gateway.context import Call
from worker.gateway.errors import ApiError, api_error
from worker.gateway.jobs import Position, _group_id
from worker.gateway.keys import ApiKeys, Caller
from worker.gateway.messages_request import MessagesRequest
from worker.gateway.responses_request import ResponsesRequest
from worker.jobs.payload import pack
from worker.jobs.protocol import Job

CALL = Call("r", Caller(), 0.0)
USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True}}
BODIES: dict[Any, list[dict[str, Any]]] = {
    ChatRequest: [
        {
            "messages": [USER],
            "tools": [TOOL],
            "tool_choice": "auto",
            "n": 2,
            "seed": -1,
            "logprobs": True,
            "top_logprobs": 3,
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "call_1", "content": "1"},
            ]
        },
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "response_format": SCHEMA,
            "stream": True,
        },
    ],
    CompletionRequest: [
        {"prompt": ["a", "b"], "echo": True, "logprobs": 2},
        {"prompt": [[1, 2], [3]], "max_tokens": 0, "n": 3},
    ],
    ResponsesRequest: [
        {
            "input": "x",
            "instructions": "y",
            "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
        },
        {
            "input": [
                {"type": "message", **USER},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "1"},
            ],
            "text": {"format": {"type": "json_object"}},
        },
    ],
    MessagesRequest: [
        {"max_tokens": 5, "system": [{"type": "text", "text": "s"}], "messages": [USER], "stop_sequences": ["x"]},
        {
            "max_tokens": 5,
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]},
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any"},
        },
    ],
    BatchRequest: [
        {"input_file_id": "file-1", "endpoint": "/v1/responses", "completion_window": "24h", "metadata": {"a": "b"}}
    ],
}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODIES[ChatRequest][0]}
MODELS = list(BODIES)
INNER = (
    "type", "role", "content", "name", "text", "tool_calls", "function", "arguments", "id", "call_id", "output",
    "parameters", "strict", "schema", "json_schema", "input", "input_text", "summary", "status", "tool_use_id",
    "thinking", "signature", "input_schema", "cache_control", "effort", "format", "regex", "choice", "grammar",
    "include_usage", "refusal", "reasoning_content", "source", "image_url", "file", "mode", "tools",
    "disable_parallel_tool_use", "budget_tokens", "key", "value",
)  # fmt: skip
WORDS = (
    *INNER[:12], *("user", "assistant", "system", "developer", "tool", "function", "auto", "none", "required", "any",
    "text"),
    *("message", "function_call", "function_call_output", "reasoning", "output_text", "json_object", "tool_use",
    "tool_result"),
    *("allowed_tools", "{}", "[", "24h", "created_at", "image_url", "input_image", "disabled", "enabled"),
    USER, TOOL, CALLED, SCHEMA, *NUMBERS, *TEXTS[:10],
)  # fmt: skip
EVENT_ID = "chatcmpl-" + "0" * 32 + ":1-0:1.2"


def seeds() -> Iterator[bytes]:
    for n, model in enumerate(MODELS):
        for k, body in enumerate(BODIES[model]):
            yield bytes([0, n]) + json.dumps(body).encode()
            yield bytes([1, n, k]) + bytes((n + k + 13 * i) % 256 for i in range(100))
    yield b"\2" + json.dumps(LINE).encode()
    yield b"\3\0" + bytes(range(100))
    yield b"\4" + EVENT_ID.encode()
    yield b"\5" + b"Bearer key"


def run(data: bytes) -> None:
    source = Source(data)
    kind = source.byte() % 6
    try:
        if kind < 2:
            model = source.choose(MODELS)
            _request(model, source.rest() if kind == 0 else _body(model, source))
        elif kind < 4:
            fields = {**LINE, **source.fields([*LINE, "x"], INNER, WORDS)} if kind == 3 else None
            line = source.rest() if fields is None else _encoded(fields)
            request = parse_line(1, line, "/v1/chat/completions")
            result_line("batch_1", request, Outcome(200, {"a": request.custom_id}))
            _request(ChatRequest, request.body)
        elif kind == 4:
            text = source.rest().decode("latin-1")
            assert str(Position.parse(text)).count(":") == text.count(":")
        else:
            ApiKeys.caller(ApiKeys(), {"authorization": source.rest().decode("latin-1")})  # type: ignore[arg-type]
    except Mistake as mistake:
        _encoded_strictly(mistake.to_api())
    except (ApiError, InvalidRequest) as error:
        known = api_error(error)
        assert 400 <= known.status < 500, known.message
        _encoded_strictly([known.openai_body(), known.anthropic_body()])


def _body(model: Any, source: Source) -> bytes:
    names = sorted({*model.model_fields, *model.ignored, *model.neutral, "x"})
    return _encoded({**source.choose(BODIES[model]), **source.fields(names, INNER, WORDS)})


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def _encoded_strictly(value: Any) -> bytes:
    """As a JSONResponse encodes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _request(model: Any, body: Any) -> None:
    request = model.parse(body)
    for job in _jobs(model, request):
        _group_id(CALL, "x-", [job])
        fields = {name: value for name, value in {"job_id": "j", **job}.items() if value is not None}
        Job.parse(fields)  # what the job client's `submit` does
        pack(fields)


def _jobs(model: Any, request: Any) -> list[dict[str, Any]]:
    jobs: dict[Any, Callable[[], list[dict[str, Any]]]] = {
        ChatRequest: lambda: request.jobs("m"),
        CompletionRequest: lambda: request.jobs("m"),
        ResponsesRequest: lambda: [request.job_fields(request.messages())],
        MessagesRequest: lambda: [request.job_fields()],
        BatchRequest: list,
    }
    found = jobs[model]()
    if model is CompletionRequest:
        request.echoes()
    if model is ResponsesRequest:
        _encoded_strictly(request.echo("m"))
    return found
