"""Random payloads decode to a job, or to an InvalidRequest that names every wrong field."""

from __future__ import annotations

import json
import string
from typing import Any

import msgpack
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.errors import InvalidRequest
from worker.jobs.payload import JOB_ID, job_id_of
from worker.jobs.protocol import Job, decode_job

IDS = st.text(string.ascii_letters + string.digits + "-_.:", min_size=1, max_size=20)
TEXTS = st.text(max_size=9)
SHORT = st.text(min_size=1, max_size=9) | st.just("x" * 256)


def numbers(low: float, high: float) -> st.SearchStrategy[Any]:
    return st.floats(low, high) | st.integers(int(low), int(high))


def out_of(low: float, high: float) -> st.SearchStrategy[Any]:
    outside = st.floats(max_value=low, exclude_max=True) | st.floats(min_value=high, exclude_min=True)
    return outside | st.sampled_from([float("nan"), "1", True, None, [], {}])


def not_an_integer(low: int, high: int | None = None) -> st.SearchStrategy[Any]:
    below = st.integers(-(2**63), low - 1)
    outside = below if high is None else below | st.integers(high + 1, high + 2**66)
    return outside | st.floats() | st.sampled_from(["1", True, []])


GOOD: dict[str, st.SearchStrategy[Any]] = {
    "job_id": IDS,
    "model": st.none() | IDS,
    "special": st.booleans(),
    "max_tokens": st.none() | st.integers(100, 2**40),
    "temperature": numbers(0, 2),
    "top_k": st.integers(0, 2**40),
    "top_p": numbers(0, 1),
    "min_p": numbers(0, 1),
    "repetition_penalty": numbers(1, 2),
    "frequency_penalty": numbers(-2, 2),
    "presence_penalty": numbers(-2, 2),
    "logit_bias": st.none() | st.dictionaries(st.integers(0, 2**31).map(str), numbers(-100, 100), max_size=5),
    "stop": st.none() | st.lists(st.text(min_size=1, max_size=5), max_size=3) | st.just(["x" * 100] * 16),
    "min_tokens": st.integers(0, 100),
    "ignore_eos": st.booleans(),
    "seed": st.none() | st.integers(0, 2**64 - 1),
    "logprobs": st.none() | st.integers(0, 20),
    "deadline_ms": st.none() | st.integers(1, 2**53),
    "correlation_id": st.none() | SHORT,
    "traceparent": st.none() | SHORT,
    "token_bytes": st.booleans(),
    "v": st.just(2),  # `response_format` needs it
    "response_format": st.none() | st.just({"type": "text"}),
}
NO_TEXT = st.integers(0, 9) | st.booleans() | st.lists(st.integers(), max_size=2)
BAD: dict[str, st.SearchStrategy[Any]] = {
    "job_id": NO_TEXT | st.sampled_from(["", "a b", "x" * 129, "é", "a\n"]),
    "model": NO_TEXT | st.just(""),
    "special": st.sampled_from([0, 1, "yes", None, []]),
    "max_tokens": not_an_integer(1),
    "temperature": out_of(0, 2),
    "top_k": not_an_integer(0) | st.none(),
    "top_p": out_of(0, 1),
    "min_p": out_of(0, 1),
    "repetition_penalty": out_of(0, 2) | st.just(0),
    "frequency_penalty": out_of(-2, 2),
    "presence_penalty": out_of(-2, 2),
    "logit_bias": st.dictionaries(st.sampled_from(["-1", "x", "1.5", " 1", "9" * 11]), numbers(-1, 1), min_size=1)
    | st.dictionaries(st.integers(0, 9).map(str), st.sampled_from([101, -100.5, "1", None, True, []]), min_size=1)
    | st.sampled_from([[], "5", 5]),
    "stop": st.sampled_from(["x", [""], ["x" * 101], ["x"] * 17, [5], [None], {}]),
    "min_tokens": not_an_integer(0) | st.none(),
    "ignore_eos": st.sampled_from([0, 1, "no", None]),
    "seed": not_an_integer(0, 2**64 - 1),
    "logprobs": not_an_integer(0, 20),
    "deadline_ms": not_an_integer(1, 2**53),
    "correlation_id": NO_TEXT | st.sampled_from(["", "x" * 257]),
    "traceparent": NO_TEXT | st.sampled_from(["", "x" * 257]),
    "token_bytes": st.sampled_from([0, 1, "yes", None, []]),
    "v": not_an_integer(1, 2) | st.none(),
    "response_format": NO_TEXT | st.sampled_from(["text", {}, {"type": "xml"}, {"type": None}]),
}
PROMPTS = st.one_of(
    st.fixed_dictionaries({"prompt": TEXTS}),
    st.fixed_dictionaries({"prompt_tokens": st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": TEXTS}),
                min_size=1,
                max_size=3,
            )
        }
    ),
)
BAD_PROMPTS: st.SearchStrategy[tuple[dict[str, Any], set[str]]] = st.sampled_from(
    [
        ({}, {"prompt"}),
        ({"prompt": 5}, {"prompt"}),
        ({"prompt": "x", "prompt_tokens": [1]}, {"prompt", "prompt_tokens"}),
        ({"messages": []}, {"messages"}),
        ({"messages": [{"role": "user"}]}, {"messages"}),
        ({"messages": [{"role": "owner", "content": "x"}]}, {"messages"}),
        ({"prompt_tokens": []}, {"prompt_tokens"}),
        ({"prompt_tokens": [1, "2"]}, {"prompt_tokens"}),
        ({"prompt_tokens": [-1]}, {"prompt_tokens"}),
    ]
)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[str, Any], set[str]]:
    """Fields, and the names of the wrong ones."""
    chosen = draw(st.sets(st.sampled_from(sorted(GOOD)))) | {"job_id"}
    broken = draw(st.sets(st.sampled_from(sorted(chosen)), max_size=6))
    fields = {name: draw((BAD if name in broken else GOOD)[name]) for name in chosen}
    unknown = draw(st.dictionaries(st.sampled_from(["tempo", "top-k", "Prompt", "", "é"]), TEXTS, max_size=2))
    prompt, wrong = draw(BAD_PROMPTS | PROMPTS.map(lambda prompt: (prompt, set())))
    return fields | unknown | prompt, broken | set(unknown) | wrong


def packed(fields: dict[str, Any], as_json: bool) -> bytes:
    try:
        return json.dumps(fields).encode() if as_json else msgpack.packb(fields)
    except OverflowError:  # msgpack has no such integers, JSON does
        return json.dumps(fields).encode()


@settings(max_examples=1000)
@given(jobs(), st.booleans())
def test_every_wrong_field_is_named_and_no_other(generated: tuple[dict[str, Any], set[str]], as_json: bool) -> None:
    fields, wrong = generated
    outcome = outcome_of(packed(fields, as_json))
    if isinstance(outcome, Job):
        assert not wrong
        assert outcome.job_id == fields["job_id"]
    else:
        assert {each["field"].partition(".")[0] for each in outcome.details["errors"]} == wrong
        assert outcome.details.get("job_id") == (None if "job_id" in wrong else fields["job_id"])


def outcome_of(payload: bytes) -> Job | InvalidRequest:
    try:
        return decode_job(payload)
    except InvalidRequest as error:
        msgpack.packb(error.details)
        return error


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXTS | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.integers(0, 9), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=400)
@given(
    st.binary(max_size=200) | ANYTHING.map(msgpack.packb) | ANYTHING.map(repr).map(lambda text: b"{" + text.encode())
)
@example(b"\xc7\x00\x05")
@example(b"{" * 5000)
def test_any_bytes_are_a_job_or_an_invalid_request(payload: bytes) -> None:
    check(payload)


@settings(max_examples=400)
@given(jobs(), st.booleans(), st.data())
def test_a_damaged_payload_is_a_job_or_an_invalid_request(
    generated: tuple[dict[str, Any], set[str]], as_json: bool, data: st.DataObject
) -> None:
    payload = bytearray(packed(generated[0], as_json))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    check(bytes(payload))


def check(payload: bytes) -> None:
    job_id = job_id_of(payload)
    assert job_id is None or JOB_ID.fullmatch(job_id)
    outcome = outcome_of(payload)
    if isinstance(outcome, Job):
        assert outcome.job_id == job_id
    else:
        assert outcome.code == "INVALID_REQUEST"
        assert outcome.details["errors"]
        assert outcome.details.get("job_id") == job_id
        assert len(json.dumps(outcome.details, allow_nan=False)) < 20_000
