"""Rules of an answer in harmony, gpt-oss's message format (see `parsers/harmony.py`).

    <|channel|>analysis<|message|>…<|end|><|start|>assistant                       reasoning
    <|channel|>final[ <|constrain|>json]<|message|>CONTENT                         the answer
    <|channel|>commentary to=functions.F[ <|constrain|>json]<|message|>{…}         a call, or
     to=functions.F<|channel|>commentary[ <|constrain|>json]<|message|>{…}

The prompt ends after `<|start|>assistant`, or in a message that the answer continues. A prompt that
is not in harmony is followed by the content.
"""

from collections.abc import Iterator, Sequence

from worker.errors import InvalidRequest
from worker.text import lark
from worker.text.json_schema import schema_source
from worker.text.parsers.harmony import HarmonyParser
from worker.text.tokenizer import Tokenizer
from worker.text.tool_grammar import ANY_OBJECT, Marks, Tool

_BUILT_IN = r"/ to=(?:browser\.[a-z_]{1,20}|python)/"
"""Tools of the model's own that a chat template may offer; they take text."""


def harmony_rules(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    tools: Sequence[Tool],
    marks: Marks,
    forced: bool,
    field: str,
    *,
    loose: bool,
    has_content: bool,
    is_json: bool,
) -> list[str]:
    """The rules of the answer, with the start rule. Raises InvalidRequest for another prompt."""
    parser = HarmonyParser(tokenizer.vocab, tokenizer.token_bytes, prompt_ids)
    state = parser.state if parser.place.channel != "tool" else "other"
    if state == "other":
        rule = "a prompt that ends after <|start|>assistant, or in the content of a message"
        raise InvalidRequest.of((field, rule, None))
    start, channel, message = marks.term("<|start|>"), marks.term("<|channel|>"), marks.term("<|message|>")
    last = ["final"] if has_content else [] if forced else ["final", "preamble"]
    json_type = f'(" "? {marks.term("<|constrain|>")} "json")?' if is_json else ""
    rules = [
        f"rest: (analysis next)* {lark.alternatives([*last, *(['call'] if tools else [])])}",
        f'next: {marks.term("<|end|>")} {start} "assistant"',
        f'analysis: {channel} "analysis" {message} text',
        f'final: {channel} "final" {json_type} {message} {"content" if has_content else "text"}',
        f'preamble: {channel} "commentary" {message} text (next rest)?',
        "text: TEXT",
        f"TEXT: {lark.ANY_TEXT}",
    ]
    if tools:
        rules += _call_rules(tools, marks, channel, message, loose=loose, built_in=not forced and not has_content)
    if state == "start":
        return ["start: rest", *rules]
    if parser.place.channel == "reasoning":
        return ["start: text next rest", *rules]
    return [f"start: {'content' if has_content else 'text'}", *rules]


def _call_rules(
    tools: Sequence[Tool], marks: Marks, channel: str, message: str, *, loose: bool, built_in: bool
) -> Iterator[str]:
    calls = [f"call_{n}" for n in range(len(tools))]
    yield f"call: {lark.alternatives([*calls, *(['built_in'] if built_in else [])])}"
    yield 'channel_name: "commentary" | "analysis"'
    yield f'json_type: (" "? {marks.term("<|constrain|>")} "json" | " json")?'
    for n, tool in enumerate(tools):
        recipient = lark.literal(f" to=functions.{tool.name}")
        in_role = f"{recipient} {channel} channel_name json_type {message} arguments_{n}"
        in_channel = f"{channel} channel_name {recipient} json_type {message} arguments_{n}"
        yield f"call_{n}: {in_role} | {in_channel}"
        yield f"arguments_{n}: {schema_source(ANY_OBJECT if loose else tool.schema)}"
    if built_in:
        text = f'(" "? {marks.term("<|constrain|>")} "code" | " code")? {message} text'
        yield f"built_in: {_BUILT_IN} {channel} channel_name {text} | {channel} channel_name {_BUILT_IN} {text}"
