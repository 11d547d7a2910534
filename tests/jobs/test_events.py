"""Encoding and decoding of events."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import VramOom
from worker.jobs import events
from worker.jobs.events import Envelope, ErrorEvent, Started, Token, Tokens, decode_event, encode_event


def sample(cls: type[events.Event]) -> events.Event:
    if cls is Tokens:
        plain, rich = Token(0, 5, "a"), Token(1, 6, "", -0.5, ((6, -0.5), (7, -1.5)), "reasoning")
        bare = Token(2, 7, "", -0.5, ((7, -0.5),), data=b"\xf0\x9f", top_data=(b"\xf0\x9f",))
        return Tokens(tokens=(plain, rich, bare))
    types = {"str": "x", "int": 7, "float": 1.5, "bool": True, "dict[str, Any]": {"n": 5}, "list[str]": ["w"]}
    return cls(**{f.name: types.get(str(f.type), "x") for f in dataclasses.fields(cls)})


ALL_EVENTS = [cls for cls in vars(events).values() if isinstance(cls, type) and issubclass(cls, events.Event)]
ENVELOPE = Envelope(job_id="a", epoch=2, ts_ms=5, worker_id="w", correlation_id="c", traceparent="t")


@pytest.mark.parametrize("cls", [cls for cls in ALL_EVENTS if cls is not events.Event])
def test_every_event_is_decoded_as_it_was_encoded(cls: type[events.Event]) -> None:
    event = sample(cls)
    kind, packed = encode_event(event, ENVELOPE)
    assert decode_event(kind, packed) == (event, ENVELOPE)
    fields = msgpack.unpackb(packed)
    assert {"v", "job_id", "epoch", "ts_ms", "worker_id", "correlation_id", "traceparent"} <= set(fields)
    later = msgpack.packb(fields | {"of_the_future": 1})
    assert decode_event(kind, later) == (event, ENVELOPE)


@pytest.mark.parametrize("cls", [cls for cls in ALL_EVENTS if cls is not events.Event])
def test_every_event_can_be_encoded_as_compact_json(cls: type[events.Event]) -> None:
    event = sample(cls)
    kind, packed = encode_event(event, ENVELOPE, "json")
    assert decode_event(kind, packed) == (event, ENVELOPE)
    assert json.loads(packed) == msgpack.unpackb(encode_event(event, ENVELOPE).packed)
    assert b" " not in packed


def test_json_has_the_text_itself_and_only_numbers_that_json_has() -> None:
    token = Token(0, 5, "é🙂\n", -math.inf, ((5, -math.inf), (6, -1.5)))
    _, packed = encode_event(Tokens(tokens=(token,)), ENVELOPE, "json")
    assert '"t":"é🙂\\n"' in packed.decode()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    item = json.loads(packed, parse_constant=refuse)["tokens"][0]
    assert item["logprob"] == item["top"][0][1] == -sys.float_info.max
    assert item["top"][1] == [6, -1.5]


def test_a_token_is_encoded_without_its_empty_fields() -> None:
    _, packed = encode_event(sample(Tokens), ENVELOPE)
    plain, rich, bare = msgpack.unpackb(packed)["tokens"]
    assert bare["bytes"] == [0xF0, 0x9F]
    assert bare["top_bytes"] == [[0xF0, 0x9F]]
    assert plain == {"i": 0, "id": 5, "t": "a", "channel": "final"}
    assert rich == {"i": 1, "id": 6, "t": "", "logprob": -0.5, "top": [[6, -0.5], [7, -1.5]], "channel": "reasoning"}


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
def test_lone_surrogates_become_escapes_wherever_they_are(encoding) -> None:
    details = {"\udc80": ["é\ud800", {"n": 5}]}
    kind, packed = encode_event(ErrorEvent(code="X", message="a\udfff", details=details), ENVELOPE, encoding)
    event, envelope = decode_event(kind, packed)
    assert envelope == ENVELOPE
    assert event == ErrorEvent(code="X", message=r"a\udfff", details={r"\udc80": [r"é\ud800", {"n": 5}]})


def test_an_error_event_has_the_fields_of_its_exception() -> None:
    event = ErrorEvent.of(VramOom("full", {"required": 5}))
    assert (event.code, event.message, event.details, event.retriable) == ("VRAM_OOM", "full", {"required": 5}, True)


def test_an_unknown_type_is_skipped_and_a_broken_event_is_not() -> None:
    assert decode_event("of_the_future", b"\xc1") is None
    for packed in (b"\xc1", b"\x80", b"\x91\x05", b"{", b'{"v":1}', b"{\xff}", msgpack.packb({"job_id": "a"})):
        with pytest.raises(Exception, match="an event of type started can't be read"):
            decode_event(Started.kind, packed)


@given(st.text(max_size=200))
def test_any_text_of_a_token_is_decoded_as_it_was_encoded(text: str) -> None:
    event = Tokens(tokens=(Token(0, 1, text),))
    for encoding in ("msgpack", "json"):
        kind, packed = encode_event(event, ENVELOPE, encoding)
        assert decode_event(kind, packed) == (event, ENVELOPE)
