"""Chats of jobs, rendered by the templates of model families, against transformers' environment.

Each case is a job and what a user of transformers passes for the same chat: tool calls' arguments
in the form that the model card says, reasoning in the template's own field.
"""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.text.small import byte_level, tokenizer_of
from worker.answer import prompt_ids
from worker.errors import InvalidRequest
from worker.jobs.protocol import Job

NOW = datetime(2025, 8, 5, 23, 30, tzinfo=UTC)
TEMPLATES = Path(__file__).parent.parent / "data" / "templates"


def apply_chat_template(source: str, messages: Any, tools: Any, tokens: dict[str, str], kwargs: dict[str, Any]) -> str:
    """What transformers' function of this name does with a template, written from its documentation."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": NOW.strftime}
    variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
    return environment.from_string(source).render({**variables, **tokens, **kwargs})


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city <now>",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Köln, …"},
                    "days": {"type": "array", "items": {"type": "integer"}, "description": "d"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "t", "parameters": {"type": "object", "properties": {}}},
    },
]
USER = {"role": "user", "content": "How is it in Köln?\n\n<b>&'\"{}"}
SYSTEM = {"role": "system", "content": "Be terse.\nAlways."}
ANSWER = {"role": "assistant", "content": "It rains.\n"}
ARGUMENTS = {"city": "Köln <b>", "days": [1, 2]}
RESULT = {
    "role": "tool",
    "content": '{"rain": true, "note": "<é>"}',
    "tool_call_id": "call12345",
    "name": "get_weather",
}
THOUGHT = "He asks.\nHm."


def call(arguments: Any, content: str | None) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call12345", "type": "function", "function": function}],
    }


@dataclass
class Family:
    """A template, its vocabulary, and what users of transformers pass to it."""

    names: str
    """Its control tokens."""
    bos: str | None = None
    eos: str | None = None
    text_arguments: bool = False
    null_content: bool = True
    tools: bool = True
    system: bool = True
    system_with_tools: bool = True
    thoughts: bool = False
    kwargs: tuple[dict[str, Any], ...] = ()
    vocabulary: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    """Fields that the template reads under another name."""

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as a user of transformers passes them."""
        passed = [dict(message) for message in messages]
        for message in passed:
            if calls := message.get("tool_calls"):
                arguments = json.dumps(ARGUMENTS, ensure_ascii=False) if self.text_arguments else ARGUMENTS
                message["tool_calls"] = [{**calls[0], "function": {**calls[0]["function"], "arguments": arguments}}]
                if message["content"] is None and not self.null_content:
                    message["content"] = ""
            for name, other in self.fields.items():
                if name in message:
                    message[other] = message[name]
        return passed


CHATML = "<|im_start|> <|im_end|> <|endoftext|>"
QWEN = CHATML + " <tool_call> </tool_call> <think> </think>"
THINKING = ({"enable_thinking": False}, {"enable_thinking": True})
FAMILIES = {
    "chatml": Family(CHATML, tools=False),
    "hermes-json": Family(QWEN),
    "qwen3": Family(QWEN, null_content=False, thoughts=True, kwargs=THINKING),
    "qwen3.5": Family(QWEN, thoughts=True, kwargs=THINKING),
    "phi-3.5": Family("<|system|> <|user|> <|assistant|> <|end|> </s>", eos="</s>", tools=False),
    "mistral-nemo": Family(
        "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        bos="<s>", eos="</s>", system_with_tools=False,
    ),
    "mistral-small": Family(
        "<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
        "[TOOL_CALLS] [CALL_ID] [ARGS] [TOOL_RESULTS] [TOOL_CONTENT] [/TOOL_RESULTS]",
        bos="<s>", eos="</s>",
    ),
    "deepseek-r1": Family(
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <think> </think>",
        bos="<｜begin▁of▁sentence｜>", text_arguments=True, thoughts=True,
    ),
    "granite-3.3": Family(
        "<|start_of_role|> <|end_of_role|> <|end_of_text|>", tools=False,
        kwargs=(
            {"thinking": True},
            {"documents": [{"doc_id": 5, "text": "Rain."}], "controls": {"citations": True, "length": "short"}},
            {"available_tools": TOOLS},
        ),
    ),
    "llama-3": Family(
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>",
        bos="<|begin_of_text|>",
        kwargs=(
            {"date_string": "1 Jan 2026"},
            {"tools_in_user_message": False, "custom_tools": TOOLS},
            {"builtin_tools": ["code_interpreter", "brave_search"]},
            {"bos_token": "<|eot_id|>"},
        ),
    ),
    "gemma-2": Family("<bos> <start_of_turn> <end_of_turn>", bos="<bos>", tools=False, system=False),
    "gemma-4": Family(
        '<bos> <|turn> <turn|> <|think|> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> '
        '<|tool_response> <tool_response|> <|"|>',
        bos="<bos>", thoughts=True, kwargs=THINKING,
    ),
    "command-r7b": Family(
        "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
        "<|START_ACTION|> <|END_ACTION|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_TOOL_RESULT|> <|END_TOOL_RESULT|>",
        bos="<BOS_TOKEN>",
    ),
    "smollm3": Family(CHATML + " <think> </think>", kwargs=(*THINKING, {"xml_tools": TOOLS})),
    "qwen2": Family("", vocabulary="qwen2", tools=False),
    "phi-3": Family("", vocabulary="phi-3", tools=False, system=False),
    "gpt-oss": Family(
        "", vocabulary="gpt-oss", null_content=False, thoughts=True, fields={"reasoning_content": "thinking"},
        kwargs=(
            {"reasoning_effort": "high"},
            {"model_identity": "You are Köln."},
            {"builtin_tools": ["python", "browser"]},
        ),
    ),
}  # fmt: skip


def cases(family: Family):
    """Yield the name of each case, and the job's fields."""
    yield "plain", {"messages": [USER]}
    yield "turns", {"messages": [USER, ANSWER, USER, ANSWER, USER]}
    if family.system:
        yield "system", {"messages": [SYSTEM, USER]}
        yield "system and turns", {"messages": [SYSTEM, USER, ANSWER, USER]}
    for kwargs in family.kwargs:
        yield " ".join(kwargs), {"messages": [USER, ANSWER, USER], "chat_template_kwargs": kwargs}
    yield "unknown variable", {"messages": [USER], "chat_template_kwargs": {"nonsense": {"a": 1}}}
    thought = f"<think>\n{THOUGHT}\n</think>\n\nIt rains."
    if family.thoughts and "thinking" not in family.fields.values():
        yield "thought in content", {"messages": [USER, {**ANSWER, "content": thought}, USER]}
    if family.thoughts:
        yield "reasoning", {"messages": [USER, {**ANSWER, "reasoning_content": THOUGHT}, USER]}
    if not family.tools:
        return
    text, calls = json.dumps(ARGUMENTS, ensure_ascii=False), []
    yield "tools", {"messages": [USER], "tools": TOOLS}
    for arguments, content in ((text, None), (ARGUMENTS, None), (text, "")):
        calls = [USER, call(arguments, content), RESULT]
        yield f"result {type(arguments).__name__} {content}", {"messages": calls, "tools": TOOLS}
    yield "results and turns", {"messages": [*calls, ANSWER, USER], "tools": TOOLS}
    yield "results without tools", {"messages": [*calls, ANSWER, USER]}
    if family.system_with_tools:
        yield "system and result", {"messages": [SYSTEM, *calls], "tools": TOOLS}
    if family.thoughts:
        thoughtful = {**call(text, None), "reasoning_content": THOUGHT}
        yield "reasoning and result", {"messages": [USER, thoughtful, RESULT], "tools": TOOLS}


CASES = [(name, case, job) for name, family in FAMILIES.items() for case, job in cases(family)]


@pytest.fixture(scope="module")
def tokenizers(qwen2, phi3, gpt_oss):
    """A function that returns the tokenizer of a family."""
    made = {"qwen2": qwen2, "phi-3": phi3, "gpt-oss": gpt_oss}

    def tokenizer(name: str):
        if name not in made:
            made[name] = small_tokenizer(name)
        return made[name]

    return tokenizer


def small_tokenizer(name: str, **keys: Any):
    family, names = FAMILIES[name], FAMILIES[name].names.split()
    rows = {token: 259 + row for row, token in enumerate(names)}
    ids = {f"{role}_token_id": rows[token] for role, token in (("bos", family.bos), ("eos", family.eos)) if token}
    source = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer_of(byte_level(names=names, **ids), **{"tokenizer.chat_template": source, **keys})


def tokens_of(tokenizer) -> dict[str, str]:
    vocab = tokenizer.vocab
    ids = {"bos_token": vocab.bos_id, "eos_token": vocab.eos_id}
    return {name: vocab.tokens[token_id] for name, token_id in ids.items() if token_id is not None}


@pytest.mark.parametrize(("name", "case", "fields"), CASES, ids=[f"{name}: {case}" for name, case, _ in CASES])
def test_a_job_s_prompt_is_that_of_transformers(name, case, fields, tokenizers):
    family, tokenizer = FAMILIES[name], tokenizers(name)
    messages, kwargs = family.messages(fields["messages"]), fields.get("chat_template_kwargs", {})
    expected = apply_chat_template(
        tokenizer.template_source, messages, fields.get("tools"), tokens_of(tokenizer), kwargs
    )
    ids = prompt_ids(Job.parse({"job_id": "a", **fields}), tokenizer, NOW)
    assert ids == tokenizer.encode_prompt(expected, special=True)
    if name != "phi-3":  # it strips white space after special tokens
        text = b"".join(tokenizer.token_bytes(token) or tokenizer.piece(token).encode() for token in ids).decode()
        assert text == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_of_a_family_stay_text_wherever_the_request_has_them(name, tokenizers):
    family, tokenizer = FAMILIES[name], tokenizers(name)
    control = set(tokenizer.vocab.special.values())
    for case, fields in cases(family):
        if case in ("bos_token", "thought in content", "reasoning and result"):
            continue
        job = {"job_id": "a", **fields}
        plain = prompt_ids(Job.parse(job), tokenizer, NOW)
        evil = prompt_ids(Job.parse(with_tokens(job, tokenizer)), tokenizer, NOW)
        assert [i for i in evil if i in control] == [i for i in plain if i in control], case


def with_tokens(job: dict[str, Any], tokenizer) -> dict[str, Any]:
    """The job with control tokens at the end of each text that its user may choose."""
    kept = ("<tool_call>", "<think>", "</think>", "<|channel|>", "<|message|>")
    names = [name for name in list(tokenizer.vocab.special)[:12] if name not in kept]

    def spoiled(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: spoiled(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [spoiled(item, key) for item in value]
        if (
            not isinstance(value, str)
            or not value
            or key in ("role", "type", "id", "tool_call_id", "job_id", "reasoning_effort")
        ):
            return value
        if key == "arguments":
            return json.dumps(spoiled(json.loads(value)), ensure_ascii=False)
        return value + "".join(names)

    return spoiled(job)


def test_the_template_tool_use_is_chosen_for_a_chat_with_tools():
    source = (TEMPLATES / "hermes-tool-use.jinja").read_text()
    tokenizer = small_tokenizer("gemma-2", **{"tokenizer.chat_template.tool_use": source})
    job = {"job_id": "a", "messages": [USER, call(ARGUMENTS, None), RESULT]}
    ids = prompt_ids(Job.parse({**job, "tools": TOOLS}), tokenizer, NOW)
    expected = apply_chat_template(source, job["messages"], TOOLS, {"bos_token": "<bos>"}, {})
    assert ids == tokenizer.encode(expected, special=True)
    assert prompt_ids(Job.parse({"job_id": "a", "messages": [USER]}), tokenizer, NOW) == tokenizer.encode(
        apply_chat_template(tokenizer.template_source, [USER], None, {"bos_token": "<bos>"}, {}), special=True
    )
    broken = small_tokenizer("chatml", **{"tokenizer.chat_template.tool_use": "{% if %}"})
    with pytest.raises(InvalidRequest, match="template for tools is not usable"):
        prompt_ids(Job.parse({"job_id": "a", "messages": [USER], "tools": TOOLS}), broken, NOW)
