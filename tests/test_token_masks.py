"""The masks of the sequences in slots: what they allow, and errors that are kept instead of raised."""

from __future__ import annotations

import numpy as np
import pytest

from tests.grammars import DigestGrammar, FaultyGrammar, ListGrammar, NativePanic, packed
from worker.errors import InvalidRequest
from worker.model import SlotStart
from worker.sampling import Sampling
from worker.token_masks import SlotMasks

SIZE = 70


def masks(padding=(), ends=()):
    return SlotMasks(SIZE, padding, ends)


def start_of(grammar, *, ends=(), max_tokens=9, replay=(), **sampling):
    return SlotStart(0, [1], Sampling(grammar=grammar, **sampling), frozenset(ends), max_tokens, replay)


def filled(of, mask):
    """The ids that the next draw may have."""
    words = np.full((1, of.words), 0xDEADBEEF, np.uint32)
    of.fill([mask], words)
    return np.flatnonzero(np.unpackbits(words[0].view(np.uint8), bitorder="little")).tolist()


def test_a_sequence_without_a_grammar_has_no_mask():
    assert masks().start(start_of(None)) is None


def test_a_mask_follows_the_accepted_ids():
    of = masks()
    mask = of.start(start_of(ListGrammar(((3, 69), (5,)), SIZE)))
    assert filled(of, mask) == [3, 69]
    mask.accept(69)
    assert filled(of, mask) == [5]
    assert mask.error is None


class EveryBit:
    """A matcher that sets bits of ids that no vocabulary has."""

    def start(self):
        return self

    def fill(self, mask):
        mask[:] = 0xFFFFFFFF


def test_padding_rows_and_ids_beyond_the_vocabulary_are_never_allowed():
    of = masks(padding=[0, 69])
    mask = of.start(start_of(EveryBit()))
    assert filled(of, mask) == list(range(1, 69))


def test_a_mask_of_padding_alone_is_an_error():
    of = masks(padding=[5])
    mask = of.start(start_of(ListGrammar(((3,), (5,)), SIZE)))
    mask.accept(3)
    filled(of, mask)
    assert mask.error.message == (
        "response_format: no token can be drawn at index 1 of the answer: the grammar allows none"
    )


def test_an_end_token_alone_before_min_tokens_is_an_error_and_afterwards_is_not():
    of = masks(ends=[7])
    mask = of.start(start_of(ListGrammar(((7, 8), (7,)), SIZE), ends=[7], min_tokens=2))
    assert filled(of, mask) == [7, 8]
    assert mask.error is None
    mask.accept(8)
    filled(of, mask)
    assert mask.error.message == (
        "response_format: no token can be drawn at index 1 of the answer: "
        "the grammar allows only the end of the answer, before min_tokens"
    )
    later = of.start(start_of(ListGrammar(((7,),), SIZE), min_tokens=2, replay=(7, 7)))
    for _ in range(2):
        later.accept(7)
    assert filled(of, later) == [7]
    assert later.error is None


def test_stop_tokens_count_as_the_end_of_the_answer():
    of = masks()
    mask = of.start(start_of(ListGrammar(((4,),), SIZE), min_tokens=1, stop_token_ids=frozenset({4})))
    filled(of, mask)
    assert "before min_tokens" in mask.error.message


def test_masks_are_due_after_the_replayed_ids_and_not_after_the_end():
    mask = masks().start(start_of(ListGrammar(((1, 2, 7),), SIZE), ends=[7], replay=(1, 2)))
    due = [mask.due]
    for token in (1, 2, 7):
        mask.accept(token)
        due.append(mask.due)
    assert due == [False, False, True, False]
    assert mask.ended


def test_the_id_that_ends_a_sequence_is_not_passed_to_the_matcher():
    grammar = ListGrammar(((1, 2),), SIZE)
    for start in (start_of(grammar, ends=[7]), start_of(grammar, max_tokens=1)):
        mask = masks().start(start)
        mask.accept(7)
        assert mask.ended
        assert mask.error is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            NativePanic("index out of range"),
            "response_format: the grammar's matcher failed: NativePanic: index out of range",
        ),
        (MemoryError(), "response_format: the grammar's matcher failed: MemoryError: "),
        (InvalidRequest("a limit was exceeded"), "a limit was exceeded"),
    ],
)
@pytest.mark.parametrize("fault", ["start", "accept", "fill"])
def test_any_exception_of_a_matcher_is_kept_as_an_invalid_request_that_says_where(fault, error, reason):
    of = masks()
    mask = of.start(start_of(FaultyGrammar(SIZE, fault=fault, error=error)))
    filled(of, mask)
    mask.accept(int(np.flatnonzero(FaultyGrammar(SIZE).allowed([]))[0]))
    assert mask.error.message == f"{reason} (at index 0 of the answer)"
    assert mask.error.code == "INVALID_REQUEST"
    filled(of, mask)
    mask.accept(1)
    assert mask.error.message.startswith(reason), "the first error is kept"


def test_an_interrupt_is_no_error_of_the_matcher():
    with pytest.raises(KeyboardInterrupt):
        masks().start(start_of(FaultyGrammar(SIZE, fault="start", error=KeyboardInterrupt())))


def test_a_long_message_of_a_matcher_is_cut():
    mask = masks().start(start_of(FaultyGrammar(SIZE, fault="start", error=ValueError("x" * 10_000))))
    assert len(mask.error.message) < 600


def test_masks_of_several_sequences_have_a_row_each():
    of, grammar = masks(), FaultyGrammar(SIZE, fault="empty", at=0)
    started = [of.start(start_of(DigestGrammar(SIZE, seed) if seed % 3 else grammar)) for seed in range(7)]
    words = np.zeros((9, of.words), np.uint32)
    of.fill(started, words)
    for seed, (mask, row) in enumerate(zip(started, words, strict=False)):
        assert (mask.error is None) == bool(seed % 3)
        expected = DigestGrammar(SIZE, seed).allowed([]) if seed % 3 else np.zeros(SIZE)
        np.testing.assert_array_equal(row, packed(expected, of.words))
    assert not words[7:].any()


def test_a_mask_packs_ids_as_the_interface_says():
    words = packed(np.arange(SIZE) == 33, 3)
    assert words.tolist() == [0, 2, 0]
