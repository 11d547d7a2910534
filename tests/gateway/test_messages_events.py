"""Events of the Messages API from recorded events of jobs."""

from __future__ import annotations

import json

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from starlette.responses import JSONResponse

from tests.gateway.recorded import FAILED, METRICS, STARTED, call, stream, text, thoughts
from tests.gateway.recorded_events import end
from worker.gateway.messages_events import MessageEvents

EVENT = TypeAdapter(RawMessageStreamEvent)
FULL = [STARTED, thoughts("hm", "m"), METRICS, text("Hi", " there"), call("f", '{"a"', ":1}"), end(6)]


def translate(*events, shows_thinking=True):
    """Events and the message of a job's recorded events."""
    translation = MessageEvents("msg_1", "m", shows_thinking=shows_thinking)
    found = [json.loads(json.dumps(event)) for item in stream(*events) for event in translation.add(item)]
    return found, translation.message


def accumulated(events):
    """The message that the anthropic package builds from events."""
    snapshot, buffers = None, {}
    for event in events:
        parsed = EVENT.validate_python(event)
        snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    return snapshot


def test_a_stream_starts_with_its_message_and_stops_with_its_reason():
    events, _ = translate(*FULL)

    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_the_accumulator_of_the_anthropic_package_gives_the_message():
    events, message = translate(*FULL)

    built = accumulated(events)

    Message.model_validate(message)
    assert [block.type for block in built.content] == ["thinking", "text", "tool_use"]
    assert built.content[0].thinking == "hmm"
    assert built.content[0].signature == message["content"][0]["signature"] != ""
    assert built.content[1].text == "Hi there"
    assert built.content[2].input == {"a": 1}
    assert (built.usage.output_tokens, built.stop_reason) == (6, "tool_use")


def test_input_tokens_and_cached_tokens_sum_to_the_prompt():
    _, message = translate(*FULL)

    usage = message["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (3, 2)


def test_hidden_thinking_leaves_no_gap_in_the_indices():
    events, message = translate(*FULL, shows_thinking=False)

    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1]


def test_a_stop_sequence_is_reported():
    events, message = translate(STARTED, text("Hi"), end(1, "stop_sequence", "\n"))

    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "\n")
    assert events[-2]["delta"]["stop_sequence"] == "\n"


def test_an_answer_at_its_limit_reports_max_tokens():
    _, message = translate(STARTED, call("f", '{"a'), end(1, "length"))

    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {"raw_arguments": '{"a'}


@pytest.mark.parametrize("arguments", ['{"a": NaN}', r'{"a": "\ud800"}', r'{"\udfff": 1}', "[1]"])
def test_arguments_that_no_response_can_have_are_kept_as_text(arguments):
    _, message = translate(STARTED, call("f", arguments), end(1))

    assert message["content"][0]["input"] == {"raw_arguments": arguments}
    JSONResponse(message)


def test_a_call_without_arguments_streams_an_empty_object():
    events, _ = translate(STARTED, call("now", ""), end(1))

    assert accumulated(events).content[0].input == {}
    assert [event["delta"] for event in events if event["type"] == "content_block_delta"] == [
        {"type": "input_json_delta", "partial_json": "{}"}
    ]


@pytest.mark.parametrize("cut", range(15))
def test_a_call_that_is_cut_anywhere_has_the_same_input(cut):
    arguments = '{"a": "\u00fc"}'
    events, message = translate(STARTED, call("f", arguments[:cut], arguments[cut:]), end(2))

    assert accumulated(events).content[0].input == message["content"][0]["input"] == {"a": "\u00fc"}


def test_two_calls_have_distinct_ids():
    _, message = translate(STARTED, call("f", "{}"), call("f", "{}", index=1), end(2))

    first, second = message["content"]
    assert first["id"] != second["id"]


def test_an_error_yields_no_event():
    events, _ = translate(STARTED, FAILED)

    assert [event["type"] for event in events] == ["message_start"]
