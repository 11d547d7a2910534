"""`response_format` of OpenAI's requests and vLLM's `structured_outputs`, as the field of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker.gateway.errors import invalid

_VLLM: Mapping[str, str] = {"json": "schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}


def format_names(structured: Mapping[str, Any] | None) -> dict[str, str]:
    """Names of the fields of `structured_outputs` by patterns of those of the job."""
    if structured is None:
        return {}
    own = {rf"response_format\.{name}": f"structured_outputs.{name}" for name in _VLLM.values() if name != "schema"}
    schema = {r"response_format\.json_schema\.schema": "structured_outputs.json"}
    return schema | own | {"response_format": "structured_outputs"}


def job_format(given: Mapping[str, Any] | None, structured: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The job field, or None for plain text. A job has OpenAI's form. Raises status 400."""
    if structured is not None:
        return _structured(structured)
    if given is None or given == {"type": "text"}:
        return None
    return dict(given)


def _structured(structured: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's form: exactly one of json, json_object, regex, choice and grammar."""
    given = {name: value for name, value in structured.items() if value is not None}
    if list(given) == ["json_object"]:
        if given["json_object"] is not True:
            raise invalid("structured_outputs.json_object: only true", "structured_outputs.json_object")
        return {"type": "json_object"}
    if len(given) != 1 or next(iter(given)) not in _VLLM:
        names = ", ".join((*_VLLM, "json_object"))
        raise invalid(f"structured_outputs: exactly one of {names}", "structured_outputs")
    name, value = next(iter(given.items()))
    if name == "json":
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}
    return {"type": name, name: value}
