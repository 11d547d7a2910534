"""Bytes of tokens to text: whole code points, and together exactly the 'replace' decoding."""

from hypothesis import given
from hypothesis import strategies as st

from worker.text.detokenizer import Detokenizer

# Pieces of code points, overlong and surrogate forms, and bytes that no UTF-8 text has.
CHUNKS = st.lists(
    st.binary(max_size=4)
    | st.text(max_size=3).map(str.encode)
    | st.sampled_from([b"\xf0\x9f", b"\x99\x82", b"\xe2\x82", b"\xac", b"\xc3", b"\xc0\x80", b"\xed\xa0", b"\xff"]),
    max_size=12,
)


def pushed(chunks: list[bytes]) -> list[str]:
    detokenizer = Detokenizer()
    return [detokenizer.push(chunk, last=at == len(chunks) - 1) for at, chunk in enumerate(chunks)]


@given(CHUNKS)
def test_joined_it_is_the_replace_decoding_of_all_bytes(chunks):
    assert "".join(pushed(chunks)) == b"".join(chunks).decode("utf-8", "replace")


def test_a_code_point_comes_with_its_last_byte():
    assert pushed([b"a\xf0\x9f", b"\x99", b"\x82b"]) == ["a", "", "🙂b"]


def test_the_last_push_flushes_an_unfinished_sequence():
    assert pushed([b"\xe2", b"\x82"]) == ["", "\ufffd"]
