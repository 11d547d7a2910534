"""A payload to a job, to the grammar of its answer, and to the events about it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgpack

from tests.fuzz.source import Source
from tests.text.small import CHATML, byte_level, tokenizer_of
from worker.answer import job_grammar
from worker.errors import InvalidRequest
from worker.jobs.chat import Message
from worker.jobs.events import ErrorEvent
from worker.jobs.payload import encoding_of, job_id_of, pack
from worker.jobs.protocol import Job, Limits, Trace, decode_job
from worker.jobs.response_format import FORMAT_TAGS

LIMITS = Limits("m", 300, 512)
FORMATS = [
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
    {"type": "regex", "regex": r"[a-z]{1,3}\d+|x"},
    {"type": "choice", "choice": ["yes", "no"]},
    {"type": "grammar", "grammar": 'start: "a" B\nB: /[0-9]+/ | %json {"type": "string"}\n'},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
JOBS = [
    {"job_id": "a", "prompt": "hi", "stop": ["x"], "logit_bias": {"5": 1.5}, "seed": 2**64 - 1, "logprobs": 3},
    {"job_id": "b", "prompt_tokens": [1, 2, 3], "temperature": 0.5, "stop_token_ids": [7], "priority": 9},
    {"job_id": "c", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tools": [TOOL]},
    {
        "job_id": "d",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    *({"job_id": "e", "prompt": "x", "response_format": each} for each in FORMATS),
]
FIELDS = sorted(Job.model_fields)
INNER = (
    *sorted(Message.model_fields), "type", "text", "function", "arguments", "parameters", "json_schema", "schema",
    "regex", "choice", "grammar", "properties", "items", "anyOf", "allOf", "$ref", "$defs", "required", "enum",
    "const", "pattern", "format", "minItems", "additionalProperties",
)  # fmt: skip
WORDS = [
    *FORMATS, TOOL, *JOBS[2]["messages"], "user", "assistant", "text", "function", "object", "string", "required",
    *(tag.strip("<>") for tag in sorted(FORMAT_TAGS)), "#/$defs/a", "(a|b)*c", "[", "start: start", "%json {",
    "<[5]>", "~",
]  # fmt: skip


class _Sources:
    """Stands for the compiler of grammars, which works in a process of its own within limits."""

    def compile(self, source):
        source.text.encode()
        json.dumps(source.schemas)


def _tokenizer(marks, template):
    extra = [(mark, 4) for mark in marks]
    tokenizer = tokenizer_of(byte_level(extra=extra), **{"tokenizer.chat_template": template})
    tokenizer.__dict__["grammars"] = _Sources()
    return tokenizer


TOKENIZERS = [
    _tokenizer(["<think>", "</think>", "<tool_call>", "</tool_call>"], CHATML),
    _tokenizer(["<tool_call>", "</tool_call>"], CHATML + "{# <function= #}"),
]


def seeds() -> Iterator[bytes]:
    for fields in JOBS:
        yield b"\0" + json.dumps(fields).encode()
        yield b"\1" + msgpack.packb(fields)
    for n in range(16):
        yield bytes([2, n]) + bytes((n * i * 37) % 251 for i in range(120))


def run(data: bytes) -> None:
    payload = data[1:]
    if data[:1] and data[0] % 4 >= 2:
        source = Source(payload)
        fields = source.choose(JOBS) | source.fields(FIELDS, INNER, WORDS)
        try:
            payload = pack(fields) if data[0] % 4 == 2 else json.dumps(fields).encode()
        except InvalidRequest as error:
            return check(error)
        except (UnicodeEncodeError, ValueError):  # a caller's, whose values are no texts, or whose integers no JSON
            return None
    job_id, encoding = job_id_of(payload), encoding_of(payload)
    try:
        job = decode_job(payload)
    except InvalidRequest as error:
        check(error, job_id)
        trace = Trace.of(job_id or "", "1-0", None, None, encoding)
        trace.encode(ErrorEvent.of(error), trace.envelope(job_id or "", 0, "w"))
        return None
    assert job.job_id == job_id
    trace = Trace.of(job.job_id, "1-0", job)
    for tokenizer in TOKENIZERS:
        try:
            job.resolve(LIMITS, 3, "1-0")
            job_grammar(job, tokenizer, [1, 2, 3])
        except InvalidRequest as error:
            check(error)
            trace.encode(ErrorEvent.of(error), trace.envelope(job.job_id, 0, "w"))
    return None


def check(error: InvalidRequest, job_id: str | None = None) -> None:
    """An error names fields, and the job if its id can be read, and it can be published."""
    assert error.details.get("job_id") == job_id
    assert error.details["errors"], error.message
    json.dumps(error.details, allow_nan=False, ensure_ascii=False).encode()
    msgpack.packb(error.details)
