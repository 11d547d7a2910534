"""Random JSON Schemas of the supported keywords, and answers to them from random logits.

python -m tests.text.random_schemas --count 20000 --seed 5     a longer run than the tests' one
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import jsonschema

from tests.text.masks import byte_level_vocabulary, closing, compiled, draw, sentencepiece_vocabulary, text_of
from worker.errors import InvalidRequest
from worker.text.tokenizer import Tokenizer

LIMIT = 400
"""Tokens of an answer, after which it counts as not finished."""

_NAMES = ("a", "b", "name", "é", 'q"', "x y", "", "12", "items", "日本")
_PATTERNS = ("^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "ab", "^(yes|no)$", "^[^x]*$", "[0-9]$", "^a.c", "é+")
_FORMATS = ("date", "date-time", "time", "uuid", "ipv4", "email")
_SCALARS: tuple[Any, ...] = (None, True, False, 0, -7, 3.5, "a", "é\n", 'say "hi"', "", [1, "b"], {"k": None}, [], {})


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema that some instance satisfies, of up to `depth` levels."""
    kinds = [_string, _integer, _number, _enum, _const, _any_scalar]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _any_of, _one_of, _all_of, _recursive]
    schema = rng.choice(kinds)(rng, depth)
    if rng.random() < 0.1:
        schema |= rng.choice(({"title": "t"}, {"description": "not {", "default": 5}, {"x-extra": [1]}))
    return schema


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(4)
    return rng.choice(
        (
            {"type": "string", "minLength": least, "maxLength": least + rng.randrange(6)},
            {"type": "string", "pattern": rng.choice(_PATTERNS)},
            {"type": "string", "format": rng.choice(_FORMATS)},
            {"type": "string"},
            {"type": ["string", "null"], "maxLength": 5},
        )
    )


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-1000, 1000)
    bounds = {
        rng.choice(("minimum", "exclusiveMinimum")): low,
        rng.choice(("maximum", "exclusiveMaximum")): low + rng.randrange(15, 3000),
    }
    return {"type": "integer"} | rng.choice(({}, bounds, bounds, {"multipleOf": 7}, {**bounds, "multipleOf": 3}))


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.choice((-5, 0, -2.5, 1.25))
    bounds = {"minimum": low, rng.choice(("maximum", "exclusiveMaximum")): low + rng.choice((1, 2.5, 100))}
    return {"type": "number"} | rng.choice(({}, bounds, bounds, {"multipleOf": 0.5}))


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(_SCALARS, rng.randrange(1, 6))}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(_SCALARS)}


def _any_scalar(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice((["null", "boolean"], "boolean", "null", ["integer", "boolean", "null"]))}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randrange(5))
    schema: dict[str, Any] = {"type": "object", "properties": {n: random_schema(rng, depth - 1) for n in names}}
    schema["required"] = [name for name in names if rng.random() < 0.6]
    choice = rng.random()
    if choice < 0.6:
        schema["additionalProperties"] = False
    elif choice < 0.8:
        schema["additionalProperties"] = random_schema(rng, 0)
    if rng.random() < 0.1:
        schema["required"] = names
        if schema.get("additionalProperties") is not False:
            schema |= {"minProperties": len(names) + rng.randrange(2), "maxProperties": len(names) + 2}
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": random_schema(rng, depth - 1)}
    if rng.random() < 0.7:
        schema |= {"minItems": rng.randrange(3), "maxItems": 2 + rng.randrange(3)}
    if rng.random() < 0.2:
        schema["prefixItems"] = [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 3))]
        schema["items"] = rng.choice((False, random_schema(rng, 0)))
        schema.pop("minItems", None)
    return schema


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}


def _one_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"oneOf": [_string(rng, 0) | {"type": "string"}, _integer(rng, 0), {"type": "null"}]}


def _all_of(rng: random.Random, depth: int) -> dict[str, Any]:
    first, second = _object(rng, depth), _object(rng, depth)
    for schema in (first, second):
        for key in ("additionalProperties", "minProperties", "maxProperties"):
            schema.pop(key, None)
    second["properties"] = {f"{name}2": inner for name, inner in second["properties"].items()}
    second["required"] = [f"{name}2" for name in second["required"]]
    return {"allOf": [first, second]}


def _recursive(rng: random.Random, depth: int) -> dict[str, Any]:
    node = {
        "type": "object",
        "properties": {"v": random_schema(rng, 0), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def hoisted(schema: Any) -> dict[str, Any]:
    """The schema with all `$defs` at its root, where references look for them."""
    found: dict[str, Any] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$defs" in value:
            name = f"node{len(found)}"
            found[name] = None
            text = json.dumps(value["$defs"]["node"]).replace('"#/$defs/node"', f'"#/$defs/{name}"')
            found[name] = walk(json.loads(text))
            return {"$ref": f"#/$defs/{name}"}
        return {key: walk(item) for key, item in value.items()}

    walked = walk(schema)
    return walked | ({"$defs": found} if found else {})


def check(tokenizer: Tokenizer, count: int, seed: int) -> tuple[int, int, int]:
    """Answer `count` random schemas; returns how many are refused, finished, and not finished.

    Raises ValidationError for an answer that is finished and not valid.
    """
    rng, favour = random.Random(seed), closing(tokenizer)
    refused = finished = unfinished = 0
    for number in range(count):
        schema = hoisted(random_schema(rng))
        try:
            grammar = compiled(tokenizer, "json_schema", schema)
        except InvalidRequest:
            refused += 1
            continue
        ids, ended = draw(grammar, tokenizer, seed + number, LIMIT, favour)
        if not ended:
            unfinished += 1
            continue
        finished += 1
        instance = json.loads(text_of(tokenizer, ids), parse_float=_finite)
        jsonschema.validate(instance, schema, jsonschema.Draft202012Validator)
    return refused, finished, unfinished


def _finite(text: str) -> float:
    """A number; 1e999 is JSON, and jsonschema fails on infinity."""
    return max(-1e308, min(float(text), 1e308))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for tokenizer in (byte_level_vocabulary(), sentencepiece_vocabulary()):
        refused, finished, unfinished = check(tokenizer, options.count, options.seed)
        print(f"{tokenizer.vocab.kind}: {refused} refused, {finished} finished and valid, {unfinished} not finished")


if __name__ == "__main__":
    main()
