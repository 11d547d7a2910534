"""Events of the Responses API from recorded events of jobs."""

from __future__ import annotations

import pytest
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.gateway.recorded import (
    CANCELLED,
    FAILED,
    METRICS,
    RESUMED,
    STARTED,
    call,
    stream,
    text,
    thoughts,
)
from tests.gateway.recorded_events import end
from worker.gateway.answer import call_id
from worker.gateway.responses_events import ResponseEvents
from worker.jobs.events import Token

REQUEST = {"model": "m", "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}}
EVENT = TypeAdapter(ResponseStreamEvent)
FULL = [
    *(STARTED, thoughts("hm", "m"), METRICS, text("Hi", " there"), RESUMED, call("f", '{"a"', ":1}")),
    *(call("g", "", index=1), end(7)),
]


def translate(*events, background=False, logprobs=False):
    """Events and the object of a job's recorded events."""
    translation = ResponseEvents("resp_1", REQUEST, 1, background=background, logprobs=logprobs)
    found = list(translation.begin())
    for item in stream(*events):
        found += translation.add(item)
    return found, translation.response


def kinds(events):
    """The types of events without the prefix, each run of one type once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


def test_an_answer_with_every_kind_of_part_gives_the_events_in_order():
    events, _ = translate(*FULL)

    reasoning = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"]
    message = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done"]
    called = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    done = ["content_part.done", "output_item.done"]
    assert kinds(events) == [
        "created",
        "in_progress",
        *reasoning,
        *done,
        *message,
        *done,
        *called,
        *called,
        "completed",
    ]


def test_sequence_numbers_count_from_zero():
    events, _ = translate(*FULL)

    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("background", [False, True])
def test_every_event_validates_with_the_types_of_the_openai_package(background):
    events, response = translate(*FULL, background=background)

    for event in events:
        EVENT.validate_python(event)
    Response.model_validate(response)


def test_the_accumulator_of_the_openai_package_gives_the_object():
    events, response = translate(*FULL)
    state = ResponseStreamState(input_tools=omit, text_format=omit)

    for event in events:
        state.handle_event(EVENT.validate_python(event))

    accumulated = state._completed_response
    assert accumulated.output_text == "Hi there"
    assert [item.type for item in accumulated.output] == ["reasoning", "message", "function_call", "function_call"]
    assert [item["type"] for item in response["output"]] == [item.type for item in accumulated.output]


def test_deltas_join_to_the_texts_of_the_done_events():
    events, response = translate(*FULL)

    for index, item in enumerate(response["output"]):
        deltas = [event["delta"] for event in events if event.get("output_index") == index and "delta" in event]
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(deltas) == whole


def test_calls_have_distinct_ids_and_one_without_arguments_gets_an_empty_object():
    _, response = translate(*FULL)

    first, second = response["output"][2:]
    assert (first["call_id"], second["call_id"]) == (call_id("resp_1", 0), call_id("resp_1", 1))
    assert first["call_id"] != second["call_id"]
    assert (second["name"], second["arguments"]) == ("g", "{}")


@pytest.mark.parametrize("cut", range(15))
def test_a_call_that_is_cut_anywhere_has_the_same_arguments(cut):
    arguments = '{"a": "\u00fc"}'
    events, response = translate(STARTED, call("f", arguments[:cut], arguments[cut:]), end(2))

    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == response["output"][0]["arguments"] == arguments


def test_usage_counts_the_tokens_of_the_end_event():
    _, response = translate(*FULL)

    assert response["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }


def test_a_background_response_is_queued_until_its_job_starts():
    events, response = translate(background=True)

    assert kinds(events) == ["created", "queued"]
    assert response["status"] == "queued"
    assert events[0]["response"]["status"] == "queued"


def test_a_running_response_is_in_progress_and_lists_complete_items():
    _, response = translate(STARTED, thoughts("hm"), text("Hi"))

    assert response["status"] == "in_progress"
    assert [item["type"] for item in response["output"]] == ["reasoning"]
    assert response["usage"] is None


def test_an_answer_at_its_limit_is_incomplete():
    events, response = translate(STARTED, text("Hi"), end(1, "length"))

    assert events[-1]["type"] == "response.incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


def test_a_failed_job_gives_a_failed_response_with_the_text_so_far():
    events, response = translate(STARTED, text("Hi"), FAILED)

    assert events[-1]["type"] == "response.failed"
    assert response["error"] == {"code": "server_error", "message": "INTERNAL: a bug"}
    assert response["output"][0]["content"][0]["text"] == "Hi"
    EVENT.validate_python(events[-1])


def test_a_cancelled_job_gives_a_cancelled_response():
    events, response = translate(STARTED, CANCELLED)

    assert events[-1]["type"] == "response.failed"
    assert response["status"] == "cancelled"
    assert response["error"] is None


def test_an_answer_without_text_has_one_empty_message():
    _, response = translate(STARTED, text(""), end(1))

    assert [item["content"][0]["text"] for item in response["output"]] == [""]


def test_log_probabilities_are_those_of_the_tokens_and_their_bytes_join_to_the_text():
    tokens = [
        Token(0, 5, "", -0.5, ((5, -0.5), (6, -1.5)), data=b"\xf0\x9f", top_data=(b"\xf0\x9f", b"a")),
        Token(1, 6, "\U0001f600", -0.25, ((6, -0.25), (7, -2.0)), data=b"\x98\x80", top_data=(b"\x98\x80", b"b")),
    ]

    events, response = translate(STARTED, tokens, end(2), logprobs=True)

    part = response["output"][0]["content"][0]
    joined = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])
    assert joined.decode() == part["text"] == "\U0001f600"
    assert [entry["logprob"] for entry in part["logprobs"]] == [-0.5, -0.25]
    for event in events:
        EVENT.validate_python(event)
    streamed = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert streamed == part["logprobs"]


def test_no_log_probabilities_without_a_request_for_them():
    _, response = translate(STARTED, [Token(0, 5, "a", -0.5)], end(1))

    assert response["output"][0]["content"][0]["logprobs"] == []
