"""Which schemas and grammars are refused and how, limits of time and memory, the cache, failures of the library."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import check_jsonschema
import jsonschema
import numpy as np
import psutil
import pytest

from tests.text.masks import accepts, allowed, byte_level_vocabulary, closing, compiled, draw, refusal, text_of
from tests.text.small import byte_level, tokenizer_of
from worker.errors import InvalidRequest
from worker.text import grammar as grammar_module
from worker.text import grammar_checker
from worker.text.json_schema import MAX_DEPTH, MAX_EXACT, prepare

SCHEMA = "response_format.json_schema.schema"
PUBLIC_SCHEMAS = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_vocabulary()


def schema_error(tokenizer, schema):
    return refusal(tokenizer, "json_schema", schema)


def nested(levels, schema=None):
    schema = schema or {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        *[("not", {"type": "string"}), ("if", {}), ("then", {}), ("else", {}), ("uniqueItems", True)],
        *[("dependentRequired", {}), ("dependentSchemas", {}), ("dependencies", {}), ("propertyNames", {})],
        *[("contains", {}), ("minContains", 1), ("maxContains", 2), ("unevaluatedProperties", False)],
        *[("unevaluatedItems", False), ("patternProperties", {"^a": {}}), ("$dynamicRef", "#a")],
        *[("$recursiveRef", "#"), ("x-guidance", {"lenient": True})],
    ],
)
def test_an_unsupported_keyword_is_named_with_its_place(tokenizer, keyword, value):
    for schema, place in (
        ({keyword: value}, ""),
        ({"properties": {"b": {"items": {"anyOf": [{}, {keyword: value}]}}}}, ".properties.b.items.anyOf.1"),
        ({"$defs": {"d": {keyword: value}}}, ".$defs.d"),
        ({"additionalProperties": {"prefixItems": [{keyword: value}]}}, ".additionalProperties.prefixItems.0"),
    ):
        field, constraint = schema_error(tokenizer, schema)
        assert field == f"{SCHEMA}{place}.{keyword}"
        assert "not supported" in constraint


@pytest.mark.parametrize(
    ("schema", "place", "constraint"),
    [
        ({"items": {"format": "ipv9"}}, ".items.format", "one of date-time"),
        ({"items": {"$ref": "https://example.org/s.json"}}, ".items.$ref", "a reference within the schema"),
        ({"items": {"$ref": 5}}, ".items.$ref", "a reference within the schema"),
        ({"type": "object", "minProperties": 2}, ".minProperties", "at most 1"),
        ({"type": "object", "minProperties": 3, "required": ["a"]}, ".minProperties", "at most 2"),
        ({"items": {"$ref": "#/$defs/none"}}, ".items", "Pointer '/$defs/none' does not exist"),
        ({"items": {"type": "text"}}, ".items", "Invalid type: text"),
        ({"items": {"type": "string", "pattern": "(?=a)"}}, ".items", "look-around"),
        ({"items": {"type": "string", "pattern": "a{2"}}, ".items", "unclosed counted repetition"),
        ({"items": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}, ".items", "anyOf in place of oneOf"),
        ({"properties": {"a": {"properties": 5}}}, ".properties.a", "properties must be an object"),
        ({"properties": {"a": 5}}, ".properties.a", "a schema: a map, true or false"),
        ({"properties": {"a": {"type": "integer", "minimum": 1e19}}}, ".properties.a.minimum", "2**53"),
        ({"items": {"const": {"a": [1, -(2**53) - 1]}}}, ".items.const", "2**53"),
        ({"enum": ["a", 2**53 + 1]}, ".enum", "2**53"),
        ({"type": "integer", "exclusiveMaximum": -(2**53) - 1}, ".exclusiveMaximum", "2**53"),
        ({"prefixItems": [{"type": "null"}], "additionalItems": False}, ".additionalItems", "beside prefixItems"),
        ({"items": {"prefixItems": [{}], "items": [{}]}}, ".items.items", "beside prefixItems"),
        ({"$schema": "http://json-schema.org/draft-03/schema#", "type": "integer"}, ".$schema", "from 4 to 2020-12"),
        # Nothing satisfies these.
        ({"type": "string", "minLength": 3, "maxLength": 2}, "", "Unsatisfiable"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "", "Unsatisfiable"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "", "Unsatisfiable"),
        ({"enum": []}, "", "Unsatisfiable"),
    ],
)
def test_what_is_wrong_in_a_schema_is_reported_with_its_place(tokenizer, schema, place, constraint):
    field, found = schema_error(tokenizer, schema)
    assert field == SCHEMA + place
    assert constraint in found


def test_a_wide_limit_becomes_one_that_is_read_exactly():
    wide = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1, "exclusiveMaximum": 1e300}
    exact = {"minimum": -MAX_EXACT, "maximum": MAX_EXACT, "exclusiveMaximum": MAX_EXACT}
    assert prepare({"properties": {"a": wide}}, "x") == ({"properties": {"a": wide | exact}}, [])
    for dialect in ("http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"):
        assert prepare({"$schema": dialect, "prefixItems": [True], "items": False}, "x")[1] == []


def test_several_mistakes_are_reported_at_once(tokenizer):
    with pytest.raises(InvalidRequest) as caught:
        compiled(tokenizer, "json_schema", {"not": {}, "properties": {n: {"contains": {}} for n in "abcdefghijkl"}})
    assert len(caught.value.details["errors"]) == 8


def test_neutral_values_and_unknown_keywords_are_accepted(tokenizer):
    schema = {
        "type": "array",
        "uniqueItems": False,
        "unevaluatedItems": True,
        "items": {"type": "integer", "format": "int32", "nullable": True, "x-order": 3, "example": 5},
        "default": {"not": "a schema"},
        "examples": [{"not": 1}],
    }
    assert accepts(compiled(tokenizer, "json_schema", schema), tokenizer, "[1,2]")


def test_a_constant_may_contain_the_names_of_keywords(tokenizer):
    grammar = compiled(tokenizer, "json_schema", {"const": {"not": 1, "if": 2}})
    assert accepts(grammar, tokenizer, '{"not":1,"if":2}')


@pytest.mark.parametrize("character", [*map(chr, range(32)), "\x7f", "\x80", "\u2028", '"', "\\", "\\u0000", "é"])
def test_a_constant_is_written_whole_or_refused(tokenizer, character):
    text = f"a{character}b"
    for keyword, value, instance in (
        ("const", text, text),
        ("enum", [1, {"k": [text]}], {"k": [text]}),
        ("const", {text: 1}, {text: 1}),
    ):
        schema = {"items": {keyword: value}}
        try:
            grammar = compiled(tokenizer, "json_schema", schema)
        except InvalidRequest:
            field, constraint = schema_error(tokenizer, schema)
            assert (field, "control characters" in constraint) == (f"{SCHEMA}.items.{keyword}", True)
            assert character not in "\b\t\n\f\r"
            assert character < " " or character == "\x7f"
        else:
            assert accepts(grammar, tokenizer, json.dumps([instance], ensure_ascii=False, separators=(",", ":")))


def test_a_key_cannot_be_written_twice_in_two_spellings(tokenizer):
    grammar = compiled(tokenizer, "json_schema", {"type": "object", "properties": {"a\n": {"const": 1}}})
    assert accepts(grammar, tokenizer, '{"a\\n":1,"b":2}')
    for text in ('{"a\\n":1,"a\\n":2}', '{"\\u0061\\n":2}', '{"a\\u000a":2}', '{"b":1,"a\\n":2}'):
        assert not accepts(grammar, tokenizer, text)


def test_a_schema_that_no_text_satisfies_is_refused_when_it_is_compiled(tokenizer):
    field, constraint = schema_error(tokenizer, {"$ref": "#"})
    assert field == SCHEMA
    assert "none can follow the first 0" in constraint


def test_deep_schemas_are_refused_and_less_deep_ones_are_not(tokenizer):
    assert accepts(compiled(tokenizer, "json_schema", nested(20)), tokenizer, '{"a":' * 20 + "1" + "}" * 20)
    compiled(tokenizer, "json_schema", nested(MAX_DEPTH))
    field, constraint = schema_error(tokenizer, nested(MAX_DEPTH + 1))
    assert field.count(".properties.a") == MAX_DEPTH + 1
    assert f"at most {MAX_DEPTH}" in constraint
    schema_error(tokenizer, nested(300))


HOSTILE = {
    "a large enum": {"enum": [f"value {i}" for i in range(100_000)]},
    "many properties": {"properties": {f"p{i}": {"type": "string"} for i in range(20_000)}},
    "properties in many places": nested(1, {"anyOf": [nested(1, {"enum": [f"{i}{'x' * 40}"]}) for i in range(8000)]}),
    "products of alternatives": {"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": n}}} for n in (1, 2)]}
                                           for i in range(18)]},
    "a large divisor": {"type": "integer", "multipleOf": 1_000_003},
    "a regular expression that doubles": {"type": "string", "pattern": "^(a|b)*a(a|b){40}c(a|b)*d(a|b){40}$"},
    "repetitions of repetitions": {"type": "string", "pattern": "^((((a{1,99}){1,99}){1,99}){1,99}){1,99}$"},
    "intersections": {"allOf": [{"type": "string", "pattern": f"a[a-z]{{{i}}}b"} for i in range(20)]},
    "many references": {"$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
                        | {"d40": {"type": "object"}}, "$ref": "#/$defs/d0"},
    "a long string": {"type": "string", "minLength": 1_000_000},
    "a long array": {"type": "array", "items": {"type": "integer"}, "minItems": 10_000_000},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_or_followed_within_limits(tokenizer, name):
    process, error = psutil.Process(), None
    before, began = process.memory_info().rss, time.monotonic()
    try:
        worst = slowest_mask(compiled(tokenizer, "json_schema", HOSTILE[name]), tokenizer, 100)
    except InvalidRequest as refused:
        error, worst = refused, 0.0
    assert error is None or error.details["errors"][0]["field"].startswith(SCHEMA)
    assert worst < 0.5
    # Compiled twice, the second time within what the first one took, then located.
    assert time.monotonic() - began < 2 * grammar_checker.TIMEOUT_S + grammar_module._LOCATE_S + 1
    assert process.memory_info().rss - before < 1.5 * grammar_checker.MEMORY_BYTES


def slowest_mask(grammar, tokenizer, steps):
    """The longest time of one mask in `steps` steps of a random answer."""
    mask, rng, slowest = grammar.start(), np.random.default_rng(0), 0.0
    for _ in range(steps):
        began = time.monotonic()
        ids = sorted(allowed(mask, tokenizer.vocab.size) - tokenizer.vocab.end_ids)
        slowest = max(slowest, time.monotonic() - began)
        if not ids:
            break
        mask.accept(int(rng.choice(ids)))
    return slowest


def test_a_grammar_that_takes_too_long_does_not_stop_the_next_one(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar_checker, "TIMEOUT_S", 0.3)
    field, constraint = schema_error(tokenizer, {"type": "integer", "multipleOf": 1_000_033})
    assert (field, "more than 0.3 s" in constraint) == (SCHEMA, True)
    assert accepts(compiled(tokenizer, "json_schema", {"type": "integer"}), tokenizer, "7")


def test_a_grammar_that_takes_too_much_memory_does_not_stop_the_next_one(tokenizer):
    patterns = [{"type": "string", "pattern": f"a[a-z]{{{i}}}c"} for i in range(20)]
    assert "more than" in schema_error(tokenizer, {"allOf": patterns})[1]
    assert accepts(compiled(tokenizer, "json_schema", {"type": "integer"}), tokenizer, "8")


def test_the_process_that_checks_grammars_ends_with_its_compiler():
    tokenizer = byte_level_vocabulary()
    compiled(tokenizer, "regex", "a")
    process = psutil.Process(tokenizer.grammars._checker.pid)
    assert process.ppid() == os.getpid()
    assert process.is_running()
    del tokenizer
    gc.collect()
    assert not process.is_running()


def test_a_checking_process_that_is_killed_while_it_compiles_does_not_refuse_the_grammar(tokenizer, monkeypatch):
    compiled(tokenizer, "regex", "abcd")
    monkeypatch.setattr(grammar_checker, "TIMEOUT_S", 60.0)  # wall time: a busy machine must reach the end
    first, killed = psutil.Process(tokenizer.grammars._checker.pid), []

    def kill_when_busy():
        with contextlib.suppress(psutil.NoSuchProcess):
            begun = first.cpu_times().user
            while first.cpu_times().user < begun + 0.1:  # of 0.4 s
                time.sleep(0.01)
            first.kill()
            killed.append(first.pid)

    killer = threading.Thread(target=kill_when_busy, daemon=True)
    killer.start()
    assert accepts(compiled(tokenizer, "json_schema", {"type": "integer", "multipleOf": 100_003}), tokenizer, "100003")
    killer.join(10)
    assert killed


def test_a_killed_checking_process_is_replaced(tokenizer):
    compiled(tokenizer, "regex", "ab")
    process = psutil.Process(tokenizer.grammars._checker.pid)
    process.kill()
    assert accepts(compiled(tokenizer, "regex", "abc"), tokenizer, "abc")


def test_grammars_are_compiled_once_also_by_many_threads():
    tokenizer = byte_level_vocabulary()
    compiled(tokenizer, "regex", "a*")
    checks = []
    original = tokenizer.grammars._checker.check
    tokenizer.grammars._checker.check = lambda source: checks.append(source) or original(source)
    first = compiled(tokenizer, "regex", "b+c")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: compiled(tokenizer, "regex", "b+c"), range(50)))
    assert all(grammar is first for grammar in found)
    assert len(checks) == 1
    for _ in range(3):
        assert "unclosed" in refusal(tokenizer, "regex", "b(")[1]
    assert len(checks) == 2


def test_the_cache_drops_the_grammars_that_were_used_least_recently(monkeypatch):
    monkeypatch.setattr(grammar_module, "_CACHE_ENTRIES", 3)
    tokenizer = byte_level_vocabulary()
    first = compiled(tokenizer, "regex", "a0")
    for n in range(1, 5):
        compiled(tokenizer, "regex", f"a{n}")
        assert compiled(tokenizer, "regex", "a0") is first
    assert len(tokenizer.grammars._cache) == 3
    monkeypatch.setattr(grammar_module, "CACHE_BYTES", 0)
    compiled(tokenizer, "regex", "a9")
    assert not tokenizer.grammars._cache
    assert tokenizer.grammars._cached_bytes == 0


def test_masks_of_one_grammar_are_independent(tokenizer):
    grammar = compiled(tokenizer, "choice", ["ab", "ac"])
    one, other = grammar.start(), grammar.start()
    one.accept(ord("a"))
    assert allowed(other, tokenizer.vocab.size) == {ord("a")}
    assert allowed(one, tokenizer.vocab.size) == {ord("b"), ord("c")}
    with pytest.raises(InvalidRequest):
        one.accept(ord("x"))
    with pytest.raises(InvalidRequest, match="none can follow the first 1"):
        allowed(one, tokenizer.vocab.size)
    other.accept(ord("a"))
    assert allowed(other, tokenizer.vocab.size) == {ord("b"), ord("c")}


def test_a_token_that_the_grammar_does_not_allow_is_refused(tokenizer):
    grammar = compiled(tokenizer, "choice", ["ab"])
    for token in (ord("b"), 10**6, -1, min(tokenizer.vocab.end_ids)):
        with pytest.raises(InvalidRequest, match=r"response_format\.choice"):
            grammar.start().accept(token)


def test_a_dead_end_of_the_vocabulary_is_an_error_and_never_an_end():
    """Without the token of a byte, its text can't be spelled: the library would allow the end tokens alone."""
    tokenizer = byte_level_vocabulary(suppress_tokens=[ord("z")])
    mask = compiled(tokenizer, "choice", ["yzy"]).start()
    mask.accept(ord("y"))
    with pytest.raises(InvalidRequest, match=r"response_format\.choice.*none can follow the first 1"):
        allowed(mask, tokenizer.vocab.size)


class PanicException(BaseException):
    """A panic, which `except Exception` does not catch."""


def test_a_panic_of_the_library_is_an_error_of_the_job(tokenizer):
    class Panics:
        def consume_token(self, token):
            raise PanicException("called `Option::unwrap()` on a `None` value")

        unsafe_compute_mask_ptr = consume_token

    mask = grammar_module.GrammarMask(Panics(), "response_format", 10)
    with pytest.raises(InvalidRequest, match=r"response_format.*PanicException"):
        mask.accept(5)
    mask = grammar_module.GrammarMask(
        type("P", (), {"unsafe_compute_mask_ptr": lambda *_: Panics().consume_token(1)})(), "f", 10
    )
    with pytest.raises(InvalidRequest, match="PanicException"):
        mask.fill(np.zeros(10, np.uint32))


def test_an_interrupt_is_no_error_of_the_job(tokenizer):
    def interrupt(token):
        raise KeyboardInterrupt

    mask = grammar_module.GrammarMask(type("M", (), {"consume_token": staticmethod(interrupt)})(), "f", 10)
    with pytest.raises(KeyboardInterrupt):
        mask.accept(5)


@pytest.mark.parametrize(
    ("grammar", "constraint"),
    [
        ('start: "a" <|im_end|>', "without special tokens"),
        ("start: <[5]> | <[*]>", "without special tokens"),
        ('start: "a" </s>', "without special tokens"),
        ('start: "a" <"> "b" <">', "without special tokens"),
        ('start: "a" @answer', "without references"),
        ('start: A\nA: "a" & ~"b"', "without the operator ~"),
        ('start[stop="x"]: /a*/', "without the options"),
        ("start[temperature=0.5]: /a*/", "without the options"),
        ("start[max_tokens=5]: /a*/", "without the options"),
        ('%llguidance {"no_forcing": false}\nstart: "a"', "without options in %llguidance"),
        ("start: %json [", "JSON after %json"),
        ("start: b", 'unknown name: "b"'),
        ('a: "b"', "no start rule"),
        ("start: /(/", "unclosed group"),
        ('start: "a', "lexer error"),
        ("start: start", "none can follow the first 0"),
    ],
)
def test_what_a_grammar_cannot_have_is_refused(tokenizer, grammar, constraint):
    field, found = refusal(tokenizer, "grammar", grammar)
    assert field == "response_format.grammar"
    assert constraint in found


@pytest.mark.parametrize("pattern", ["a\\", "(", "a{2", "[", "(?=a)", "*", "(?-u:\\xff)", "a" * 200 + "{1000}{1000}("])
def test_an_invalid_regular_expression_is_refused(tokenizer, pattern):
    assert refusal(tokenizer, "regex", pattern)[0] == "response_format.regex"


def test_a_regular_expression_may_contain_slashes_quotes_and_line_breaks(tokenizer):
    grammar = compiled(tokenizer, "regex", 'a/b\\/c"\n\\n#//[/]')
    assert accepts(grammar, tokenizer, 'a/b/c"\n\n#///')


def test_a_schema_in_a_grammar_is_checked_like_a_schema(tokenizer):
    field, _ = refusal(tokenizer, "grammar", 'start: %json {"properties": {"a": {"not": {}}}}')
    assert field == "response_format.grammar.%json.properties.a.not"
    assert refusal(tokenizer, "grammar", 'start: %json {"x-guidance": {"lenient": true}}')[0].endswith("x-guidance")


def test_a_grammar_may_contain_the_marks_of_special_tokens_in_texts_and_comments(tokenizer):
    source = 'start: "<|im_end|>" /<x>~/ b~2 // <|no|> ~\nb: "#\\"" # <no>\n'
    assert accepts(compiled(tokenizer, "grammar", source), tokenizer, '<|im_end|><x>~#"#"')


def test_a_vocabulary_without_end_tokens_has_no_grammars():
    tokenizer = tokenizer_of(byte_level(names=()))
    assert not tokenizer.vocab.end_ids
    tokenizer.grammars.prepare()
    assert refusal(tokenizer, "regex", "a") == (
        "response_format.regex",
        "none: the model's vocabulary has no end token",
    )


def test_a_grammar_of_more_than_a_megabyte_is_refused(tokenizer):
    assert "at most 1048576 bytes" in refusal(tokenizer, "choice", [f"{n:0200}" for n in range(6000)])[1]


@pytest.mark.parametrize("path", sorted(PUBLIC_SCHEMAS.glob("*.json")), ids=lambda path: path.stem)
def test_a_public_schema_is_refused_by_keyword_or_place_or_followed(tokenizer, path):
    schema = json.loads(path.read_text())
    refused = None
    try:
        grammar = compiled(tokenizer, "json_schema", schema)
    except InvalidRequest as error:
        refused = error
    if refused is not None:
        assert refused.details["errors"][0]["field"].startswith(SCHEMA)
        return
    validator = jsonschema.validators.validator_for(schema)(schema)
    for seed in range(5):
        ids, ended = draw(grammar, tokenizer, seed, 300, closing(tokenizer))
        if ended:
            validator.validate(json.loads(text_of(tokenizer, ids)))
