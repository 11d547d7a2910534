"""The grammar of an answer: free reasoning, then content of a format, or tool calls.

    answer = [reasoning] content                      response_format
           | [reasoning] (content | calls)            the same, with tools and tool_choice auto
           | [reasoning] calls                        tool_choice required, or a function's name
           | [reasoning] (text call)* text            tool_choice auto: only calls are constrained

Reasoning and calls have the notation of the model, which `parsers/` reads and `tool_grammar.py`,
`gemma4_grammar.py` and `harmony_grammar.py` write. With tool_choice auto nothing is refused unless
a tool is `strict`: if the parameters of a tool can't be enforced, all take any JSON object, and if
that does not compile, the answer is free.
Read next: grammar.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from worker.errors import InvalidRequest
from worker.text import lark
from worker.text.gemma4_grammar import gemma4_rules
from worker.text.grammar import CompiledGrammar, GrammarSource
from worker.text.harmony_grammar import harmony_rules
from worker.text.json_schema import prepare, schema_source
from worker.text.parsers import thinks, tool_format
from worker.text.parsers.think import opens_thinking
from worker.text.tokenizer import Tokenizer
from worker.text.tool_grammar import Marks, Tool, call_rules, requested_tools

FormatKind = Literal["json_schema", "regex", "choice", "grammar"]
_FIELDS: Mapping[FormatKind, str] = {
    "json_schema": "response_format.json_schema.schema",
    "regex": "response_format.regex",
    "choice": "response_format.choice",
    "grammar": "response_format.grammar",
}


@dataclass(frozen=True)
class ContentFormat:
    """The form of an answer's content."""

    kind: FormatKind
    value: Any
    """A JSON Schema, a regular expression, a list of texts, or a grammar."""


@dataclass(frozen=True)
class _Content:
    """A content format as the rule `content` of a grammar."""

    rule: str
    field: str
    subgrammar: str = ""
    """A grammar of its own, which the rule refers to."""
    schemas: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def is_json(self) -> bool:
        return bool(self.schemas)


def answer_grammar(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    content: ContentFormat | None,
    tools: Sequence[Any] | None,
    tool_choice: Any,
    *,
    ignore_eos: bool = False,
) -> CompiledGrammar | None:
    """Compile the grammar of an answer to the prompt; None if the answer is free.

    Raises:
        InvalidRequest: The format, a tool or the choice is not supported: which, where and why.
    """
    forced = _is_forced(tool_choice)
    form = tool_format(tokenizer)
    if forced and form is None:
        rule = "auto or none: this worker has no grammar for the tool calls of this model"
        raise InvalidRequest.of(("tool_choice", rule, None))
    wanted = requested_tools(tools, tool_choice) if form is not None else []
    if forced and ignore_eos:
        raise InvalidRequest.of(("ignore_eos", "false with a forced tool call, which ends with an end token", True))
    if content is None and (not wanted or (ignore_eos and not forced)):
        return None
    rules = None if content is None or forced else _content(content)
    must = forced or not wanted or any(tool.strict for tool in wanted)
    for loose in (False, True):
        try:
            return tokenizer.grammars.compile(_source(tokenizer, prompt_ids, rules, wanted, forced, loose=loose))
        except InvalidRequest:
            if must or (loose and rules is not None):
                raise
    return None


def _is_forced(tool_choice: Any) -> bool:
    return tool_choice == "required" or isinstance(tool_choice, Mapping)


def _content(content: ContentFormat) -> _Content:
    """Raises InvalidRequest for what a grammar can't enforce."""
    field = _FIELDS[content.kind]
    if content.kind == "json_schema":
        prepared, errors = prepare(content.value, field)
        found = _Content(f"content: {schema_source(prepared)}", field, schemas=((field, prepared),))
    elif content.kind == "regex":
        found, errors = _Content(f"content: {lark.regex(content.value)}", field), []
        if re.search(r"(?<!\\)(?:\\\\)*\\$", content.value):  # llguidance would drop the last character
            errors = [(field, "a regular expression that does not end with a single backslash", None)]
    elif content.kind == "choice":
        choices = " | ".join(map(lark.literal, dict.fromkeys(content.value)))
        found, errors = _Content(f"content: CHOICE\nCHOICE: {choices}", field), []
    else:
        grammar, errors = lark.checked(content.value, field)
        found = _Content("content: @content", field, subgrammar=f"{grammar}\n{lark.OPTIONS}\n")
    if errors:
        raise InvalidRequest.of(*errors)
    return found


def _source(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    content: _Content | None,
    tools: Sequence[Tool],
    forced: bool,
    *,
    loose: bool,
) -> GrammarSource:
    """`loose`: the arguments of tools are any JSON objects."""
    marks = Marks(tokenizer.vocab)
    field = content.field if content is not None else "tool_choice" if forced else "tools"
    if tool_format(tokenizer) == "harmony":
        rules = harmony_rules(tokenizer, prompt_ids, tools, marks, forced, field, loose=loose, **_of_content(content))
    else:
        of_answer = gemma4_rules if tool_format(tokenizer) == "gemma4" else _plain_rules
        rules = of_answer(tokenizer, prompt_ids, content is not None, tools, marks, forced, loose=loose)
    lines = [lark.OPTIONS, *rules, *([content.rule] if content is not None else [])]
    text = "\n".join(lines) + "\n"
    schemas = content.schemas if content is not None else ()
    schemas += tuple((tool.field, tool.schema) for tool in tools if not loose)
    if content is not None and content.subgrammar:
        subgrammar = {"name": "content", "lark_grammar": content.subgrammar}
        text = json.dumps({"grammars": [{"name": "answer", "lark_grammar": text}, subgrammar]}, ensure_ascii=False)
    return GrammarSource(text, field, schemas)


def _of_content(content: _Content | None) -> dict[str, bool]:
    return {"has_content": content is not None, "is_json": content is not None and content.is_json}


def _plain_rules(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    has_content: bool,
    tools: Sequence[Tool],
    marks: Marks,
    forced: bool,
    *,
    loose: bool,
) -> list[str]:
    """The rules of an answer with reasoning in `<think>` and calls in `<tool_call>`."""
    thinking, is_xml = thinks(tokenizer), bool(tools) and tool_format(tokenizer) == "qwen_xml"
    opened = thinking and opens_thinking(tokenizer, prompt_ids)
    rules = call_rules(tools, marks, is_xml=is_xml, loose=loose) if tools else []
    if has_content:
        rules.append("body: content | calls" if tools else "body: content")
    elif forced:
        rules.append("body: calls")
    else:
        never = "" if opened or not thinking or marks.is_control("<think>") else r"[ \n\t]{0,4}<think>"
        rules += ["body: (lead call)* text", *marks.until("lead", "<tool_call>", never)]
        rules += ["text: TEXT", f"TEXT: {lark.ANY_TEXT}{lark.unless(never)}"]
    if not thinking:
        return ["start: body", *rules]
    free_text = not has_content and not forced
    thought = "reasoning body" if free_text else r"reasoning /\n{0,4}/ body"
    rules += marks.until("reasoning", "</think>")
    if is_xml:  # a call ends reasoning, too
        rules += marks.until("to_call", "<tool_call>")
        thought += " | to_call call (lead call)* text" if free_text else r" | to_call call (/\n{0,2}/ opened_call)*"
    rules.append(f"thought: {thought}")
    if opened:
        return ["start: thought", *rules]
    return ["start: body | think thought", *marks.after_space("think", "<think>"), *rules]
