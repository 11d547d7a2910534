"""Random request bodies: an answer or status 400, never an internal error."""

from __future__ import annotations

import contextlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import InvalidRequest
from worker.gateway.chat import ChatRequest
from worker.gateway.completions import CompletionRequest
from worker.gateway.errors import ApiError, api_error
from worker.jobs.protocol import Job

WORDS = st.sampled_from(
    ["function", "auto", "none", "required", "allowed_tools", "user", "assistant", "tool", "text", "f", "json_schema"]
)
NAMES = st.sampled_from(
    [
        *("type", "function", "name", "content", "role", "tool_calls", "allowed_tools", "tools", "mode", "text"),
        *("arguments", "refusal", "reasoning", "include_usage", "json_schema", "schema", "json", "regex", "choice"),
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), WORDS, st.text(max_size=3))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=8,
)


def bodies(request, **required):
    fields = st.sampled_from(sorted({*request.model_fields, *request.ignored, *request.neutral}))
    return st.dictionaries(fields, VALUES, max_size=4).map(lambda given: required | given)


def check(request, body):
    with contextlib.suppress(ApiError):
        parsed = request.parse(json.dumps(body).encode())
        for job in parsed.jobs("m"):
            try:
                Job.parse({"job_id": "j", **job})
            except InvalidRequest as refused:
                error = api_error(refused)
                assert (error.status, bool(error.param)) == (400, True)
        if isinstance(parsed, CompletionRequest):
            parsed.echoes()


@settings(max_examples=400)
@given(bodies(ChatRequest, messages=[{"role": "user", "content": "x"}]))
def test_a_chat_is_served_or_refused(body):
    check(ChatRequest, body)


@settings(max_examples=400)
@given(bodies(CompletionRequest, prompt="x"))
def test_a_completion_is_served_or_refused(body):
    check(CompletionRequest, body)


@given(st.binary(max_size=20))
def test_bytes_are_a_request_or_refused(body):
    with contextlib.suppress(ApiError):
        ChatRequest.parse(body)
