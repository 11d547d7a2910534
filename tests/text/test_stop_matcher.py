"""StopMatcher across pushes, against a naive search of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.text.detokenizer import StopMatcher

TEXTS = st.lists(st.text("ab\n", max_size=5), max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def naive(texts: list[str], stops: list[str]) -> tuple[str, str | None]:
    """The text before the first stop string that a push completes; without one, the whole text."""
    for count in range(1, len(texts) + 1):
        whole = "".join(texts[:count])
        found = [(whole.index(stop), -len(stop), stop) for stop in stops if stop in whole]
        if found:
            at, _, stop = min(found)
            return whole[:at], stop
    return "".join(texts), None


@given(TEXTS, STOPS)
def test_text_is_released_up_to_the_stop_string_that_a_naive_search_finds(texts, stops):
    matcher = StopMatcher(stops)
    released = "".join([matcher.push(text) for text in texts]) + matcher.flush()
    assert (released, matcher.matched) == naive(texts, stops)


@given(TEXTS, STOPS)
def test_the_longest_suffix_that_may_become_a_stop_string_is_withheld(texts, stops):
    matcher, whole, released = StopMatcher(stops), "", ""
    for text in texts:
        whole, released = whole + text, released + matcher.push(text)
        if matcher.matched is not None:
            break
        held = max((n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])), default=0)
        assert released == whole[: len(whole) - held]


@pytest.mark.parametrize("texts", [["one STOP two"], ["one ST", "OP two"], ["one ", "S", "T", "O", "P", " two"]])
def test_a_stop_string_split_across_tokens_is_found(texts):
    matcher = StopMatcher(["STOP"])
    assert "".join(matcher.push(text) for text in texts) == "one "
    assert matcher.matched == "STOP"


def test_a_near_miss_is_released_as_soon_as_it_cannot_match():
    matcher = StopMatcher(["STOP"])
    assert [matcher.push(text) for text in ("a S", "TO", "SSTO", "RE")] == ["a ", "", "STOS", "STORE"]
    assert (matcher.flush(), matcher.matched) == ("", None)


def test_the_first_start_wins_and_then_the_longest():
    first, longest = StopMatcher(["bcd", "c"]), StopMatcher(["b", "bc"])
    assert (first.push("abcd"), first.matched) == ("a", "bcd")
    assert (longest.push("abcd"), longest.matched) == ("a", "bc")


def test_no_text_is_released_after_a_match():
    matcher = StopMatcher(["."])
    assert [matcher.push("a."), matcher.push("b"), matcher.flush()] == ["a", "", ""]
