"""Random bodies of Responses, Messages and lines of batches: an answer or status 400."""

from __future__ import annotations

import contextlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import InvalidRequest
from worker.gateway.batch_lines import LineRequest, Mistake, parse_line
from worker.gateway.errors import ApiError
from worker.gateway.messages_request import MessagesRequest
from worker.gateway.responses_request import ResponsesRequest
from worker.jobs.protocol import Job

WORDS = st.sampled_from(
    [
        *("function", "auto", "none", "any", "tool", "required", "user", "assistant", "system", "text", "f", "{}"),
        *("message", "function_call", "function_call_output", "reasoning", "input_text", "output_text", "json_schema"),
        *("tool_use", "tool_result", "thinking", "reasoning_text", "summary_text", "enabled", "disabled"),
    ]
)
NAMES = st.sampled_from(
    [
        *("type", "name", "content", "role", "call_id", "arguments", "output", "text", "summary", "schema", "format"),
        *("id", "input", "tool_use_id", "thinking", "input_schema", "parameters", "strict", "effort", "status"),
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), WORDS, st.text(max_size=3))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=8,
)
TYPED = st.dictionaries(NAMES, VALUES, max_size=4).flatmap(
    lambda fields: WORDS.map(lambda word: fields | {"type": word})
)
ITEMS = st.lists(
    st.one_of(TYPED, st.builds(lambda c: {"role": "user", "content": c}, st.lists(TYPED, max_size=2))), max_size=4
)


def bodies(request, parts: str):
    """Bodies with random fields, among which `parts` has items that resemble real ones."""
    fields = st.sampled_from(sorted({*request.model_fields, *request.ignored}))
    random = st.dictionaries(fields, VALUES, max_size=4)
    return st.one_of(random, st.builds(lambda given, items: given | {parts: items}, random, ITEMS))


def check_job(fields):
    with contextlib.suppress(InvalidRequest):  # status 400
        Job.parse({"job_id": "j", **fields})


@settings(max_examples=500)
@given(bodies(ResponsesRequest, "input"))
def test_a_response_is_served_or_refused(body):
    with contextlib.suppress(ApiError):
        request = ResponsesRequest.parse({"input": "x", **json.loads(json.dumps(body))})
        check_job(request.job_fields(request.messages()))
        json.dumps(request.echo("m"))


@settings(max_examples=500)
@given(bodies(MessagesRequest, "messages"))
def test_a_message_is_served_or_refused(body):
    with contextlib.suppress(ApiError):
        known = {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
        request = MessagesRequest.parse(known | json.loads(json.dumps(body)))
        check_job(request.job_fields())


@given(
    st.one_of(
        st.binary(max_size=20),
        st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body", "x"]), VALUES).map(json.dumps),
    )
)
def test_a_line_is_a_request_or_a_mistake(raw):
    with contextlib.suppress(Mistake):
        line = raw if isinstance(raw, bytes) else raw.encode()
        assert isinstance(parse_line(1, line, "/v1/responses"), LineRequest)
