"""Types of the fields of a job, which pydantic validates without coercion."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """A map of known fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "valid Unicode, encoded as UTF-8") from None
    return text


def _json_value(value: Any) -> Any:
    """Refuse values that JSON lacks: they could not be rendered by a chat template."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
            if not all(isinstance(key, str) for key in item):
                raise _NO_JSON
        elif isinstance(item, list | tuple):
            stack += item
        elif not (item is None or isinstance(item, str | int | float)):
            raise _NO_JSON
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise _NO_JSON from None
    return value


_NO_JSON = PydanticCustomError(
    "json", "JSON values: maps with keys of text, lists, valid Unicode, finite numbers, true, false, null"
)
Text = Annotated[str, AfterValidator(_encodable)]
ShortText = Annotated[Text, Field(min_length=1, max_length=256)]
JsonMap = Annotated[dict[str, Any], AfterValidator(_json_value)]

TEXT, LIST, MAP = "<text>", "<list>", "<map>"
"""Tags of the alternatives of a field, which `one_of` chooses by kind."""
TEXT_TAG, LIST_TAG, MAP_TAG = Tag(TEXT), Tag(LIST), Tag(MAP)


def one_of(rule: str) -> Discriminator:
    """Choose the tagged alternative of the value's kind; the error for another kind is `rule`."""
    return Discriminator(_kind, custom_error_type="kind", custom_error_message=rule)


def _kind(value: object) -> str | None:
    kinds = ((str, TEXT), (list | tuple, LIST), (dict | Strict, MAP))
    return next((tag for kind, tag in kinds if isinstance(value, kind)), None)
