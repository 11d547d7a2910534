"""Parts of an answer: what opens and closes one, and which tokens belong to it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.recorded import call, text, thoughts
from worker.gateway.answer_parts import AnswerParts, Closed, Delta, Opened


def changes_of(tokens):
    parts = AnswerParts()
    changes = [change for token in tokens for change in parts.add(token)] + list(parts.close())
    return parts, changes


def contents(parts):
    return [(part.channel, part.name, part.text) for part in parts.parts]


def test_each_channel_is_a_part_of_its_own():
    parts, _ = changes_of([*thoughts("a", "b"), *text("c"), *call("f", "{", "}"), *text("")])

    assert contents(parts) == [("reasoning", "", "ab"), ("final", "", "c"), ("tool", "f", "{}")]
    assert (parts.tokens, parts.reasoning_tokens, parts.has_calls) == (6, 2, True)


def test_two_calls_of_one_tool_are_two_parts():
    parts, _ = changes_of([*call("f", "{}"), *call("f", "{}", index=1)])

    assert [part.call for part in parts.parts] == [0, 1]


def test_only_the_first_call_counts_without_parallel_calls():
    parts = AnswerParts(parallel_calls=False)
    tokens = [*call("f", "{}"), *call("g", "{}", index=1)]

    changes = [change for token in tokens for change in parts.add(token)] + list(parts.close())

    assert contents(parts) == [("tool", "f", "{}")]
    assert parts.tokens == 2
    assert len(changes) == 3


def test_tokens_without_text_open_no_part():
    parts, changes = changes_of(text("", ""))

    assert parts.parts == []
    assert changes == []
    assert parts.tokens == 2


def test_a_call_without_arguments_gets_an_empty_object():
    parts, changes = changes_of(call("now", ""))

    assert contents(parts) == [("tool", "now", "{}")]
    assert [type(change) for change in changes] == [Opened, Delta, Closed]


def test_tokens_that_complete_no_text_belong_to_the_next_delta_of_their_channel():
    tokens = [*thoughts("a"), *text("", "\U0001f600", "")]

    _, changes = changes_of(tokens)

    deltas = [change for change in changes if isinstance(change, Delta)]
    assert [len(delta.tokens) for delta in deltas] == [1, 2]


pieces = st.sampled_from(["", "a", "bc"])
runs = st.one_of(
    st.lists(pieces, max_size=3).map(lambda p: text(*p)),
    st.lists(pieces, max_size=3).map(lambda p: thoughts(*p)),
    st.tuples(st.lists(pieces, min_size=1, max_size=3), st.integers(0, 3)).map(lambda p: call("f", *p[0], index=p[1])),
)


@given(st.lists(runs, max_size=6))
def test_parts_open_and_close_in_turn_and_deltas_join_to_their_text(lists):
    parts, changes = changes_of([token for tokens in lists for token in tokens])

    joined: dict[int, str] = {}
    is_open = None
    for change in changes:
        if isinstance(change, Opened):
            assert is_open is None
            is_open = change.part.index
            assert is_open == len(joined)
            joined[is_open] = ""
            continue
        assert change.part.index == is_open
        if isinstance(change, Delta):
            assert change.text
            joined[is_open] += change.text
        else:
            is_open = None
    assert is_open is None
    assert list(joined.values()) == [part.text for part in parts.parts]
