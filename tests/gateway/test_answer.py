"""A job's events as parts of an answer: channels, tool calls, resumption at every position."""

from __future__ import annotations

import json

import pytest

from tests.gateway.recorded_events import end, pages, started, texts
from worker.gateway.answer import ChoiceReader, usage_of
from worker.gateway.chat_chunks import CollectedChoice, delta_fields

CALLS = texts(
    *(("reasoning", text) for text in ("let", " me", " see")),
    *(("final", text) for text in ("I", " look", "")),
    *(("tool", text, 0, "get_weather") for text in ("", '{"city"', ': "Kö', "ln", '"}')),
    *(("tool", text, 1, "now") for text in ("",)),
    *(("tool", text, 2, "get_time") for text in ("{", "}")),
    ("final", ""),
)
EVENTS = [started(), *CALLS, end(len(CALLS))]


def joined(deltas):
    """The deltas as OpenAI's accumulator joins them; fails on what it breaks on."""
    message = {"role": None, "content": "", "reasoning": "", "reasoning_content": "", "calls": []}
    for delta in deltas:
        if "role" in delta:
            assert message["role"] is None, "the role is repeated"
            message["role"] = delta["role"]
        for name in ("content", "reasoning", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", []):
            calls = message["calls"]
            if call["index"] == len(calls):
                assert call["type"] == "function"
                calls.append({"id": call["id"], **call["function"]})
            else:
                assert "id" not in call, "the id is repeated"
                assert "name" not in call["function"], "the name is repeated"
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return message


def parts_of(items, received=0, entry=1, page=1, **options):
    reader = ChoiceReader("job", **options)
    return reader, [part for each in pages(items, entry=entry, page=page) for part in reader.read(each, received)]


@pytest.mark.parametrize("entry", [1, 3, 16])
@pytest.mark.parametrize("page", [1, 2, 50])
def test_deltas_join_to_the_same_message_however_events_are_batched(entry, page):
    _, parts = parts_of(EVENTS, entry=entry, page=page)
    message = joined(map(delta_fields, parts))
    calls = message.pop("calls")
    assert message == {
        "role": "assistant",
        "content": "I look",
        "reasoning": "let me see",
        "reasoning_content": "let me see",
    }
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("get_weather", {"city": "Köln"}),
        ("now", {}),
        ("get_time", {}),
    ]
    assert len({call["id"] for call in calls}) == 3


@pytest.mark.parametrize("entry", [1, 4])
def test_a_reader_that_resumes_after_any_part_gets_exactly_the_rest(entry):
    _, whole = parts_of(EVENTS, entry=entry)
    message = joined(map(delta_fields, whole))
    for cut in range(len(whole) + 1):
        received = whole[cut - 1].step if cut else 0
        for other in (1, 2, 16):  # a server that lost writes has entries of another size
            _, rest = parts_of(EVENTS, received, entry=other, page=3)
            assert joined(map(delta_fields, [*whole[:cut], *rest])) == message


def test_steps_increase_so_that_every_part_has_a_position_of_its_own():
    for entry in (1, 2, 16):
        steps = [part.step for part in parts_of(EVENTS, entry=entry)[1]]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize("size", range(1, 9))
def test_arguments_cut_anywhere_join_to_the_unstreamed_ones(size):
    arguments = json.dumps({"text": 'a "quoted" \\ line\n', "n": [1, 2.5, None], "emoji": "🌦"}, ensure_ascii=False)
    cut = [arguments[at : at + size] for at in range(0, len(arguments), size)]
    tokens = texts(*(("tool", text, 0, "f") for text in cut))
    items = [started(), *tokens, end(len(tokens))]
    _, parts = parts_of(items)
    assert joined(map(delta_fields, parts))["calls"][0]["arguments"] == arguments
    collected = CollectedChoice(0, ChoiceReader("job"))
    for page in pages(items):
        collected.add(page)
    answer = collected.to_api(logprobs=False)
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments}
    assert answer["message"]["content"] is None
    assert answer["finish_reason"] == "tool_calls"


def test_a_call_without_parameters_streams_an_empty_object_at_the_end_too():
    tokens = texts(("tool", "", 0, "now"), ("tool", " ", 0, "now"))
    _, parts = parts_of([started(), *tokens, end(2)])
    (call,) = joined(map(delta_fields, parts))["calls"]
    assert json.loads(call["arguments"]) == {}
    assert parts[-1].end is not None


def test_without_parallel_calls_only_the_first_one_is_part_of_the_answer():
    _, parts = parts_of(EVENTS, parallel_tool_calls=False)
    assert [call["name"] for call in joined(map(delta_fields, parts))["calls"]] == ["get_weather"]


@pytest.mark.parametrize(
    ("reason", "calls", "expected"),
    [
        ("stop", False, "stop"),
        ("stop_sequence", False, "stop"),
        ("length", False, "length"),
        ("stop", True, "tool_calls"),
        ("length", True, "length"),
    ],
)
def test_finish_reasons_are_openai_s(reason, calls, expected):
    tokens = texts(("tool", "{}", 0, "f") if calls else ("final", "x"))
    reader, _ = parts_of([started(), *tokens, end(1, reason, "!" if reason == "stop_sequence" else None)])
    assert reader.finish_reason() == expected


def test_usage_counts_each_prompt_once_and_every_choice_s_tokens():
    readers = [parts_of(EVENTS)[0] for _ in range(4)]
    usage = usage_of(readers, prompts=2).to_api()
    assert usage["prompt_tokens"] == 2 * 5
    assert usage["completion_tokens"] == 4 * len(CALLS)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2 * 2}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4 * 3}
