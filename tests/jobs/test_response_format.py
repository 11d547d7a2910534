"""The field `response_format`: its forms, its errors, and the schema version of jobs that have it."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from tests.jobs.harness import FakeRedisHarness
from worker.errors import InvalidRequest
from worker.jobs import protocol
from worker.jobs.keys import queue_key
from worker.jobs.protocol import Job

JSON = {"type": "json_object"}
FORMATS = (
    {"type": "text"},
    JSON,
    {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": {}}},
    {"type": "regex", "regex": "[0-9]+"},
    {"type": "choice", "choice": ["yes", "no"]},
    {"type": "grammar", "grammar": 'start: "a"'},
)


def job(**fields: Any) -> Job:
    return Job.parse({"job_id": "a", "prompt": "hello"} | fields)


def errors(**fields: Any) -> dict[str, tuple[str, Any]]:
    """Field to constraint and value of every error."""
    with pytest.raises(InvalidRequest) as caught:
        job(**fields)
    return {error["field"]: (error["constraint"], error["value"]) for error in caught.value.details["errors"]}


@pytest.mark.parametrize("given", FORMATS, ids=lambda given: given["type"])
def test_each_form_is_accepted(given: dict[str, Any]) -> None:
    parsed = job(response_format=given).response_format
    assert parsed is not None
    assert parsed.model_dump(by_alias=True, exclude_none=True) == given


@pytest.mark.parametrize(
    ("given", "field", "constraint"),
    [
        ("json", "response_format", "a map whose type is one of text, json_object, json_schema"),
        ({"type": "xml"}, "response_format", "a map whose type is one of text, json_object, json_schema"),
        ({}, "response_format", "a map whose type is one of text, json_object, json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema", "required"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "response_format.json_schema.schema", "required"),
        ({"type": "json_schema", "json_schema": {"schema": 3}}, "response_format.json_schema.schema", "a map"),
        ({"type": "json_schema", "json_schema": {"schema": {"a": b"x"}}}, "response_format.json_schema.schema", "JSON"),
        ({"type": "regex"}, "response_format.regex", "required"),
        ({"type": "regex", "regex": "a", "flags": "i"}, "response_format.flags", "unknown field"),
        ({"type": "choice", "choice": []}, "response_format.choice", "at least 1 items"),
        ({"type": "choice", "choice": ["a", 3]}, "response_format.choice.1", "text"),
        ({"type": "choice", "choice": ["a", ""]}, "response_format.choice.1", "at least 1"),
        ({"type": "grammar", "grammar": ""}, "response_format.grammar", "at least 1"),
        ({"type": "text", "regex": "a"}, "response_format.regex", "unknown field"),
    ],
)
def test_an_error_names_the_field_and_the_constraint(given: Any, field: str, constraint: str) -> None:
    found = errors(response_format=given)
    assert list(found) == [field]
    assert found[field][0].startswith(constraint)


def test_texts_of_a_format_are_reported_by_their_length() -> None:
    given = {"type": "choice", "choice": ["secret", "x" * 5000]}
    assert errors(response_format=given)["response_format.choice.1"][1] == "string of 5000"


def test_a_job_with_a_format_is_of_version_2_and_others_of_version_1() -> None:
    assert job().v == 1
    assert job(response_format=JSON).v == 2
    assert job(response_format=JSON, v=2).v == 2
    assert errors(response_format=JSON, v=1) == {"response_format": ("only with v 2", None)}


def test_a_worker_of_an_older_schema_refuses_by_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SCHEMA_VERSION", 1)
    rule = "at most 1: this worker is older than the job's schema version"
    assert errors(v=2, response_format=JSON)["v"] == (rule, 2)


async def test_the_client_writes_the_version_only_where_a_job_needs_it() -> None:
    harness = FakeRedisHarness()
    async with harness.client() as client:
        await client.submit(prompt="x")
        await client.submit(prompt="x", response_format=JSON)
    entries = await harness.connect().range(queue_key("default"), "-", "+", 2)
    assert [msgpack.unpackb(fields["p"]).get("v") for _, fields in entries] == [None, 2]
    await harness.close()


def test_ignoring_end_tokens_contradicts_a_format_that_is_not_text() -> None:
    assert errors(response_format=JSON, ignore_eos=True)["ignore_eos"][0].startswith("false with response_format")
    assert job(response_format={"type": "text"}, ignore_eos=True).ignore_eos
