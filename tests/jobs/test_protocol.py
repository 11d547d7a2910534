"""A job's fields: ranges, defaults, resolution by a worker, trace ids."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import msgpack
import pytest

from worker.errors import InvalidRequest
from worker.jobs.payload import encoding_of, job_id_of
from worker.jobs.protocol import Job, Limits, Trace, decode_job, derived_seed

LIMITS = Limits(model="echo", vocab_size=1000, context=100)


def job(**fields: Any) -> Job:
    return Job.parse({"job_id": "a", "prompt": "hello"} | fields)


def wrong(**fields: Any) -> dict[str, Any]:
    """Field to value of every error."""
    with pytest.raises(InvalidRequest) as caught:
        job(**fields)
    assert all(set(error) == {"field", "constraint", "value"} for error in caught.value.details["errors"])
    return {error["field"]: error["value"] for error in caught.value.details["errors"]}


def test_the_defaults_are_those_of_the_table() -> None:
    assert job().model_dump() == {
        **{"job_id": "a", "prompt": "hello", "model": None, "messages": None, "prompt_tokens": None, "special": True},
        **{"max_tokens": None, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "penalize_prompt": False},
        **{"logit_bias": None, "stop": None, "min_tokens": 0, "ignore_eos": False, "seed": None, "logprobs": None},
        **{"priority": 0, "tenant": None},
        **{"deadline_ms": None, "correlation_id": None, "traceparent": None, "v": 1, "encoding": "msgpack"},
        **{"chat_template_kwargs": None, "tools": None, "tool_choice": None, "stop_token_ids": None},
        **{"token_bytes": False, "response_format": None},
    }


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("job_id", ["a", "A-z_0.9:x", "x" * 128], ["", "x" * 129, "a b", "a/b", "ä", "a\n", 5, None]),
        ("model", ["echo", None], ["", 5, b"echo"]),
        ("special", [True, False], [1, "true", None]),
        ("max_tokens", [1, 10**9, None], [0, -1, 1.0, "5", True]),
        ("temperature", [0, 0.0, 1, 2, 2.0], [-0.1, 2.1, "1", True, float("nan"), float("inf"), None]),
        ("top_k", [0, 1, 50000], [-1, 1.0, "5", True]),
        ("top_p", [0, 0.5, 1], [-0.1, 1.1, "1", True, float("nan")]),
        ("min_p", [0, 0.5, 1], [-0.1, 1.1, "1"]),
        ("repetition_penalty", [0.01, 1, 2], [0, -1, 2.1, "1"]),
        ("frequency_penalty", [-2, 0, 2], [-2.1, 2.1, "1"]),
        ("presence_penalty", [-2, 0, 2], [-2.1, 2.1, "1"]),
        ("penalize_prompt", [True], [1]),
        ("logit_bias", [{}, {5: 1}, {"5": -100.0}, {5: 100}, None], [[], {-1: 0}, {"x": 1}, {"٣": 1}, {5: 101}]),
        ("logit_bias", [{0: 0}], [{5: "1"}, {5: True}, {5: float("nan")}, {5: 1, "5": 1}, {1.0: 1}, "5", {True: 1}]),
        ("stop", [[], ["x"], ["x" * 100] * 16, ["é"], None], ["x", [""], ["x" * 101], ["x"] * 17, [5], [b"x"]]),
        ("min_tokens", [0, 5], [-1, 1.5, "1", None]),
        ("ignore_eos", [True, False], [0, "no"]),
        ("seed", [0, 2**64 - 1, None], [-1, 2**64, 1.0, "7", True]),
        ("logprobs", [0, 20, None], [-1, 21, 1.0, True]),
        ("priority", [0, 9], [-1, 10, 1.0, None]),
        ("tenant", ["a", "x" * 256, None], ["", "x" * 257, 1]),
        ("deadline_ms", [1, 10**9, None], [0, -1, 1.5, "1"]),
        ("correlation_id", ["x", None], ["", "x" * 257, 5]),
        ("traceparent", ["00-aa-bb-01", None], ["", 5]),
        ("token_bytes", [True, False], [0, "yes", None]),
        ("v", [1, 2], [0, -1, 3, 99, "1", 1.0, None, True]),
    ],
)
def test_a_field_accepts_its_range_only(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        job(**{field: value})
    for value in bad:
        assert {name.partition(".")[0] for name in wrong(**{field: value})} == {field}, value


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("prompt", ["", "hi", "\x00"], [5, b"hi", ["hi"], "\ud800"]),
        (
            "messages",
            [[{"role": role, "content": "x"}] for role in ("system", "user", "assistant", "developer", "tool")],
            [
                [],
                "hi",
                [5],
                [{}],
                [{"role": "user"}],
                [{"role": "owner", "content": "x"}],
                [{"role": "user", "content": 5}],
            ],
        ),
        ("messages", [[{"role": "user", "content": ""}]], [[{"role": "user", "content": "x", "names": "n"}], {}]),
        ("prompt_tokens", [[0], [5, 6]], [[], [-1], [1.5], ["5"], [True], 5, "5", [2**31]]),
    ],
)
def test_a_prompt_has_one_of_three_forms(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        Job.parse({"job_id": "a", field: value})
    for value in bad:
        with pytest.raises(InvalidRequest) as caught:
            Job.parse({"job_id": "a", field: value})
        assert {e["field"].partition(".")[0] for e in caught.value.details["errors"]} == {field}, value


def test_exactly_one_form_of_prompt_is_needed() -> None:
    assert set(wrong(prompt=None)) == {"prompt"}
    assert set(wrong(prompt_tokens=[1])) == {"prompt", "prompt_tokens"}
    assert set(wrong(messages=[{"role": "user", "content": "x"}], prompt=5)) == {"prompt", "messages"}
    job(prompt_tokens=None, messages=None)


def test_every_error_is_reported_with_its_value() -> None:
    found = wrong(
        temperature=3, top_k=-1, stop=["ok", ""], logit_bias={"7": 500}, tempo=4, v=3, min_tokens=9, max_tokens=8
    )
    assert found == {
        **{"temperature": 3, "top_k": -1, "stop.1": "", "logit_bias.7": 500, "tempo": 4, "v": 3, "min_tokens": 9},
    }


def test_a_newer_schema_version_is_named_in_the_error() -> None:
    with pytest.raises(InvalidRequest, match="v: at most 2: this worker is older than the job's schema version"):
        job(v=3)


def test_a_job_has_the_version_of_its_newest_field() -> None:
    assert job(logprobs=1).v == 1
    assert job(token_bytes=True).v == 2


def test_an_error_never_echoes_a_prompt_and_stays_small() -> None:
    secret = "my secret plan " * 1000
    with pytest.raises(InvalidRequest) as caught:
        job(
            prompt=secret,
            messages=[{"role": secret, "content": 5, "kontent": secret}] * 500,
            prompt_tokens=["x"] * 1000,
            promt=secret,
            stop=[secret] * 17,
            seed=10**5000,
            logit_bias=dict.fromkeys(range(1000), 500),
        )
    packed = msgpack.packb({"message": caught.value.message, "details": caught.value.details})
    assert secret[:80].encode() not in packed
    assert len(packed) < 10_000
    counted = {e["field"]: e["value"] for e in caught.value.details["errors"] if e["constraint"] == "further errors"}
    assert counted["logit_bias"] == 992


@pytest.mark.parametrize(
    ("payload", "fields", "job_id"),
    [
        (b"", {"payload"}, None),
        (b"\xc1", {"payload"}, None),
        (b"\x91\x01", {"payload"}, None),
        (b"{", {"payload"}, None),
        (b'{"job_id": "a", "prompt": "x"', {"payload"}, "a"),
        (b'{"prompt": "x", "job_id": "a", "top', {"payload"}, "a"),
        (b'{"prompt": {"job_id": "a"}, "x', {"payload"}, None),
        (b'{"prompt": ' + b"[" * 200_000, {"payload"}, None),
        (b"\x91" * 200_000, {"payload"}, None),
        (b"\xdf\xff\xff\xff\xff", {"payload"}, None),
        (b'{"job_id": "a", "seed": ' + b"9" * 5000 + b"}", {"payload"}, "a"),
        (b'{"job_id": "a", "prompt": "x", "prompt": "y"}', {"prompt"}, "a"),
        (b'{"job_id": "a", "prompt": "\xff"}', {"prompt"}, "a"),
        (b'{"job_id": "a", "prompt": "\\ud800"}', {"prompt"}, "a"),
        (b'{"job_id": "a", "prompt": "x", "temperature": NaN, "top_p": 1e999}', {"temperature", "top_p"}, "a"),
        (b'{"job_id": "not an id", "prompt": "x"}', {"job_id"}, None),
        (b'{"job_id": "a", "prompt": "x",}', {"payload"}, "a"),
        (b'\xef\xbb\xbf{"job_id": "a", "prompt": "x"', {"payload"}, "a"),
        (b' \r\n{"job_id": "a", "prompt": 5}', {"prompt"}, "a"),
        ('{"job_id": "a", "prompt": "x"'.encode("utf-16"), {"payload"}, "a"),
        (json.dumps(json.dumps({"job_id": "a", "prompt": "x"})).encode(), {"payload"}, "a"),
        (b"{'job_id': 'a', 'prompt': 'x'}", {"payload"}, "a"),
        (b"{job_id: a, prompt: x}", {"payload"}, "a"),
        (b'[{"job_id": "a"}]', {"payload"}, None),
        (b"\xef\xbb\xbf", {"payload"}, None),
        (b" ", {"payload"}, None),
        (b'"', {"payload"}, None),
        (msgpack.packb({b"job_id": "a", "prompt": "x"}), {"payload", "job_id"}, "a"),
        (msgpack.packb({"job_id": b"a", "prompt": "x"}), {"job_id"}, "a"),
        (msgpack.packb({"job_id": "a", "prompt": "x"}) + b"\x00", {"payload"}, "a"),
        (b"\x83\xa6job_id\xa1a\xa6prompt\xa1x\x90\x01", {"payload"}, "a"),
        (b"\x83\xa6job_id\xa1a\xa6prompt\xa1x\x05\x01", {"5"}, "a"),
        (b"\x83\xa6job_id\xa1a\xa6prompt\xa1x\xa6prompt\xa1y", {"prompt"}, "a"),
        (b"\x82\xa6job_id\xa1a\xa6prompt\xa2\xff\xfe", {"prompt"}, "a"),
        (msgpack.packb({"job_id": "a", "prompt": msgpack.Timestamp(1)}), {"prompt"}, "a"),
        (msgpack.packb({f"f{n}": n for n in range(100)} | {"job_id": "a"}), {"payload"}, "a"),
    ],
)
def test_a_bad_payload_is_an_invalid_request_that_names_what_it_can(
    payload: bytes, fields: set[str], job_id: str | None
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_job(payload)
    assert {error["field"] for error in caught.value.details["errors"]} == fields
    assert caught.value.details.get("job_id") == job_id == job_id_of(payload)


def test_a_payload_over_the_limit_is_not_read() -> None:
    payload = msgpack.packb({"job_id": "a", "prompt": "x" * 1000})
    assert decode_job(payload, len(payload)).job_id == "a"
    with pytest.raises(InvalidRequest, match="payload: at most 1000 bytes") as caught:
        decode_job(payload, 1000)
    assert caught.value.details == {
        "errors": [{"field": "payload", "constraint": "at most 1000 bytes", "value": len(payload)}],
        "job_id": "a",
    }


def test_json_and_msgpack_give_the_same_job() -> None:
    fields = {"job_id": "a", "messages": [{"role": "user", "content": "é"}], "logit_bias": {"5": 1}, "seed": 2**64 - 1}
    assert decode_job(json.dumps(fields).encode()) == decode_job(msgpack.packb(fields))
    assert decode_job(msgpack.packb(fields | {"logit_bias": {5: 1.0}})).logit_bias == {5: 1.0}


@pytest.mark.parametrize("before", ["", " ", "\n", "\t\r\n  ", "\ufeff", "\ufeff\n ", " " * 5000])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_json_may_follow_white_space_or_a_byte_order_mark(before: str, encoding: str) -> None:
    payload = (before + '{"job_id": "a", "prompt": "é", "encoding": "json"}\n').encode(encoding)
    if encoding == "utf-8" or not before.startswith("\ufeff"):
        assert decode_job(payload).prompt == "é"
        assert (job_id_of(payload), encoding_of(payload)) == ("a", "json")


def test_the_encoding_is_read_from_a_payload_that_is_otherwise_invalid() -> None:
    assert encoding_of(b'{"job_id": "a", "encoding": "json", "prompt": ') == "json"
    assert encoding_of(msgpack.packb({"encoding": "json", "prompt": 5})) == "json"
    for payload in (b"", b"{", b'{"encoding": "xml"}', b'{"prompt": {"encoding": "json"}}', b"\xc1"):
        assert encoding_of(payload) == "msgpack"
    with pytest.raises(InvalidRequest, match="encoding: 'msgpack' or 'json'"):
        job(encoding="xml")


def test_default_max_tokens_is_limited_to_the_context_and_a_given_one_refused() -> None:
    roomy = Limits(model="echo", vocab_size=1000, context=10_000)
    assert job().resolve(roomy, 10, "1-0").max_tokens == 2048
    assert job().resolve(LIMITS, 10, "1-0").max_tokens == 90
    assert job().resolve(LIMITS, 99, "1-0").max_tokens == 1
    assert job(max_tokens=90).resolve(LIMITS, 10, "1-0").max_tokens == 90
    with pytest.raises(InvalidRequest, match="max_tokens: at most 90"):
        job(max_tokens=91).resolve(LIMITS, 10, "1-0")


def test_a_job_beyond_the_worker_s_limits_is_refused_with_every_reason() -> None:
    many = Job.parse(
        {"job_id": "a", "prompt_tokens": [5, 1000, 999], "model": "b", "top_k": 1001, "logit_bias": {1000: 1}}
    )
    with pytest.raises(InvalidRequest) as caught:
        many.resolve(LIMITS, 100, "1-0")
    found = {error["field"]: error["value"] for error in caught.value.details["errors"]}
    assert found == {
        "model": "b",
        "prompt_tokens": 100,
        "prompt_tokens.1": 1000,
        "logit_bias.1000": 1000,
        "top_k": 1001,
    }
    with pytest.raises(InvalidRequest, match="prompt: at least one token"):
        job().resolve(LIMITS, 0, "1-0")
    resolved = job(model="echo", top_k=1000).resolve(LIMITS, 99, "1-0")
    assert (resolved.model, resolved.prompt_len) == ("echo", 99)


def test_a_missing_seed_is_derived_from_the_job_and_its_entry() -> None:
    assert job(seed=0).resolve(LIMITS, 1, "5-0").seed == 0
    digest = hashlib.sha256(b"a\x005-0").digest()
    assert job().resolve(LIMITS, 1, "5-0").seed == derived_seed("a", "5-0") == int.from_bytes(digest[:8], "big")
    assert derived_seed("a", "12-3") != derived_seed("a1", "2-3")


def test_the_entry_s_traceparent_overrides_the_job_s_and_missing_ids_are_derived() -> None:
    given = job(correlation_id="mine", traceparent="00-job")
    assert Trace.of("a", "5-0", given, "00-entry") == Trace("mine", "00-entry")
    assert Trace.of("a", "5-0", given) == Trace("mine", "00-job")
    derived = Trace.of("a", "5-0", job())
    assert derived == Trace.of("a", "5-0") != Trace.of("a", "5-1")
    version, trace_id, span_id, flags = derived.traceparent.split("-")
    assert (version, len(trace_id), len(span_id), flags) == ("00", 32, 16, "01")
    assert derived.correlation_id == trace_id


def test_a_payload_of_four_kilobytes_is_validated_in_under_a_millisecond() -> None:
    payload = msgpack.packb({"job_id": "a", "messages": [{"role": "user", "content": "x" * 80}] * 40, "stop": ["\n"]})
    assert len(payload) > 4000
    durations = []
    for _ in range(50):
        since = time.perf_counter()
        decode_job(payload)
        durations.append(time.perf_counter() - since)
    assert sorted(durations)[25] < 0.001
