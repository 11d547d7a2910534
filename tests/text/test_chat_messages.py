"""Messages in the form that a template accepts: roles, parts, tool calls; and texts without a place."""

import json
from datetime import UTC, datetime

import pytest

from tests.llama_cpp import LlamaCpp
from tests.text.small import CHATML_NAMES, USER_DEFINED, byte_level, tokenizer_of
from tests.tiny_vocabulary import PHI3
from worker.answer import prompt_ids
from worker.errors import InvalidRequest
from worker.gguf_file import GgufFile
from worker.jobs.protocol import Job
from worker.text.tokenizer import load_tokenizer

NOW = datetime(2025, 8, 5, tzinfo=UTC)
NAMES = (*CHATML_NAMES, "</think>")
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}({{ part.text }}){% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
FIRST_PART = CHATML.replace("{{ m.content }}", "{{ m.content[0]['text'] + '.' }}")
BOTH = CHATML.replace(
    "{{ m.content }}", "{{ m.content if m.content is string else m.content|map(attribute='text')|join('+') }}"
)
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content if m.content is not none else '-' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}: {ARGUMENTS}{% endfor %}<|im_end|>{% endfor %}"
)
MAP_CALLS = CALLS.replace("{ARGUMENTS}", "{{ call.function.arguments | tojson }}")
TEXT_CALLS = CALLS.replace("{ARGUMENTS}", "{{ '' + call.function.arguments }}")
XML_CALLS = CALLS.replace("{ARGUMENTS}", "{% for k, v in call.function.arguments|items %}{{ k }}={{ v }}{% endfor %}")
EITHER_CALLS = CALLS.replace(
    "{ARGUMENTS}", "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments|tojson }}{% endif %}"
)  # fmt: skip


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def tokenizer_with(template):
    return tokenizer_of(byte_level(names=NAMES), **{"tokenizer.chat_template": template})


def rendered(template, *messages, **fields):
    tokenizer = tokenizer_with(template)
    ids = prompt_ids(Job.parse({"job_id": "a", "messages": list(messages), **fields}), tokenizer, NOW)
    return b"".join(tokenizer.token_bytes(i) or tokenizer.piece(i).encode() for i in ids).decode()


def rejection(template, *messages, **fields):
    with pytest.raises(InvalidRequest) as caught:
        rendered(template, *messages, **fields)
    return caught.value.message


def called(arguments, **fields):
    calls = [{"id": "call12345", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    return message("assistant", None, tool_calls=calls, **fields)


HI, HO = message("user", "hi"), message("assistant", "ho")
AB = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_a_thought_is_dropped_by_a_template_that_looks_for_its_end_token():
    drop = (
        "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
        "{% else %}{{ m.content }}{% endif %}"
    )
    template = CHATML.replace("{{ m.content }}", drop)
    thought = message("assistant", "<think>\nsecret\n</think>\n\nans")
    assert rendered(template, HI, thought, HI) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nans<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (CHATML, ["a", "b"], "a\nb"),
        (PARTS, ["a", "b"], "(a)(b)"),
        (PARTS, "a", "(a)"),
        (FIRST_PART, "a", "a."),
        (BOTH, ["a", "b"], "a+b"),
        (BOTH, "a", "a"),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_content_is_passed_in_the_form_that_the_template_reads(template, content, expected, role):
    parts = content if isinstance(content, str) else [{"type": "text", "text": text} for text in content]
    assert f"<|im_start|>{role}\n{expected}<|im_end|>" in rendered(template, HI, message(role, parts), HI)


def test_a_system_text_goes_to_the_next_user_turn_of_a_template_without_that_role(tiny):
    with GgufFile.open(tiny("phi3")) as file:
        tokenizer = load_tokenizer(dict(file.metadata))
    assert tokenizer.template_source == PHI3
    system = message("system", "Be brief.")
    with LlamaCpp(tiny("phi3")) as llama:
        for messages in ([system, HI], [system, HI, HO, HI], [message("developer", "Be brief."), HI]):
            ids = tokenizer.encode_chat(messages, now=NOW)
            assert ids == llama.tokenize(llama.apply_template(messages), bos=True, special=True)
    assert tokenizer.encode_chat([system, HI], now=NOW) != tokenizer.encode_chat([HI], now=NOW)
    joined = tokenizer.encode_chat([message("user", "Be brief.\nTruly.\nhi")], now=NOW)
    assert tokenizer.encode_chat([system, message("system", "Truly."), HI], now=NOW) == joined
    late = [HI, HO, system, HI]
    assert tokenizer.encode_chat(late, now=NOW) == tokenizer.encode_chat(
        [HI, HO, message("user", "Be brief.\nhi")], now=NOW
    )
    with pytest.raises(InvalidRequest, match=r"^messages.1: followed by a user message: .* no system role"):
        tokenizer.encode_chat([HI, system], now=NOW)


def test_a_system_text_is_merged_where_the_template_raises_or_reads_parts():
    raises = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML
    for template, text in (
        (raises, "S\nhi"),
        (PARTS.replace("in messages", "in messages if m.role == 'user'"), "(S\nhi)"),
    ):
        assert rendered(template, message("system", "S"), HI).startswith(f"<|im_start|>user\n{text}<|im_end|>")


def test_developer_is_a_system_message_unless_the_template_knows_the_role():
    assert rendered(CHATML, message("developer", "D"), HI).startswith("<|im_start|>system\nD<|im_end|>")
    knows = "{% set known = 'developer' %}" + CHATML
    assert rendered(knows, message("developer", "D"), HI).startswith("<|im_start|>developer\nD<|im_end|>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MAP_CALLS, 'f: {"x": "é", "n": [1]}'),
        (TEXT_CALLS, 'f: {"x": "é", "n": [1]}'),
        (XML_CALLS, "f: x=én=[1]"),
        (EITHER_CALLS, 'f: {"x": "é", "n": [1]}'),
    ],
)
def test_arguments_are_passed_as_the_template_reads_them(template, expected):
    arguments = {"x": "é", "n": [1]}
    for given in (arguments, json.dumps(arguments, ensure_ascii=False)):
        assert expected in rendered(template, HI, called(given), HI)


def test_text_of_arguments_is_passed_unchanged_if_the_template_takes_text():
    for template in (TEXT_CALLS, EITHER_CALLS):
        assert 'f: {"x":1 }' in rendered(template, HI, called('{"x":1 }'), HI)


def test_arguments_that_are_no_json_are_refused_by_a_template_that_needs_a_map():
    for text in ("{x", "[1]", "5"):
        assert rejection(MAP_CALLS, HI, called(text)).startswith(
            "messages.1.tool_calls.0.function.arguments: JSON text of an object"
        )
    assert "f: {}" in rendered(MAP_CALLS, HI, called(" "))
    assert "f: {x" in rendered(TEXT_CALLS, HI, called("{x"))


def test_null_content_is_passed_unless_the_template_fails_on_it_or_prints_it():
    assert "<|im_start|>assistant-f" in rendered(MAP_CALLS, HI, called("{}"))
    for content in ("{{ m.content }}", "{{ m.content + '' }}"):
        template = MAP_CALLS.replace("{{ m.content if m.content is not none else '-' }}", content)
        assert "<|im_start|>assistantf" in rendered(template, HI, called("{}"))


def test_fields_that_a_job_lacks_are_not_in_its_messages():
    fields = "{{ messages[1]|list|sort|join(' ') }}"
    template = "{{ messages[0].content }}{{ messages[0]|length }}" + fields + "{{ messages[1].content }}"
    assert rendered(template, HI, message("assistant", "x", name="Bob", reasoning_content="r")) == (
        "hi2content name reasoning_content rolex"
    )


@pytest.mark.parametrize(
    ("template", "messages", "field"),
    [
        ("{{ messages[0].content }}", [HI, HO, message("user", "bye")], "messages.2.content"),
        ("{{ messages[0].content }}{{ messages|length }}", [HI, HO, HI], "messages.2.content"),
        (
            "{{ messages[0].content }}{{ messages[1].content }}",
            [message("system", "S")] * 2 + [HI],
            "messages.2.content",
        ),
        (CHATML.replace("messages", "messages if m.role != 'tool'"), [HI, message("tool", "5")], "messages.1.content"),
        ("{{ messages[0].content }}", [HI, message("assistant", "last")], "messages.1.content"),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", [message("user", AB)], "messages.0.content.1"),
    ],
)
def test_a_text_that_the_template_drops_is_an_error(template, messages, field):
    assert rejection(template, *messages).startswith(
        f"{field}: must be in the prompt, but the model's chat template drops"
    )


def test_a_template_may_drop_blank_texts_thoughts_and_earlier_answers():
    users = CHATML.replace("in messages", "in messages if m.role == 'user'")
    for messages in (
        [HI, HO, HI],
        [HI, message("tool", " \n"), HI],
        [HI, message("assistant", "<think>x</think>\n")],
        [message("user", "  hi\n")],
    ):
        assert "hi" in rendered(users.replace("m.content", "m.content|trim"), *messages)


def test_a_text_that_switches_something_need_not_arrive():
    switch = "{{ 'off' if '/no_think' in messages[0].content else 'on' }}"
    drop = "{% for m in messages[1:] %}{{ m.content }}{% endfor %}"
    system = message("system", "/no_think")
    printed = "{{ messages[0].content.replace('/no_think', '') if messages[0].role == 'system' }}"
    assert rendered(switch + printed + drop, system, HI) == "offhi"
    assert rendered("{{ '</think>' in messages[0].content }}", message("user", "x</think>")) == "True"
    marker = (
        "{{ messages[0].content if messages|length == 2 }}{{ '+' if messages[1].content }}{{ messages[-1].content }}"
    )
    assert rejection(marker, HI, HI, HI).startswith("messages.0.content: must be in the prompt")
    hidden = "{% for m in messages if 'secret' not in m.content %}{{ m.content }}{% endfor %}"
    assert rejection(hidden, message("user", "secret"), HO, HI).startswith("messages.0.content: must be in the prompt")


def test_a_text_arrives_in_any_form():
    for form in (
        "m.content|tojson",
        "m|tojson",
        "m",
        "m.content|upper",
        "m.content|safe + ''",
        "m.content|urlencode",
        "m.content|reverse",
    ):
        rendered(CHATML.replace("m.content", form), message("user", 'say "é"'))


def test_variables_that_a_job_cannot_set_are_refused_by_name():
    for name in ("messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "strftime_now"):
        text = rejection(CHATML, HI, chat_template_kwargs={name: False, "other": 1})
        assert text == f"chat_template_kwargs.{name}: not a variable that a job can set"


def test_variables_are_text_but_a_special_token_of_a_special_variable():
    template = "{{ messages[0].content }}{{ bos_token }}{{ x }}{{ sep_token is defined }}{{ eos_token is defined }}"
    tokenizer = tokenizer_with(template)
    kwargs = {"bos_token": "<|im_end|>", "x": "<|im_end|>", "eos_token": "a<|im_end|>"}
    ids = tokenizer.encode_chat([HI], now=NOW, kwargs=kwargs)
    assert ids == [
        *tokenizer.encode("hi"),
        *tokenizer.encode("<|im_end|>", special=True),
        *tokenizer.encode("<|im_end|>FalseTrue"),
    ]


TOOL = {"type": "function", "function": {"name": "f"}}


def test_a_tool_choice_is_a_variable_only_if_given():
    template = CHATML + "{{ tools|length }}{{ tool_choice is defined }}{{ tool_choice }}"
    assert rendered(template, HI, tools=[TOOL]).endswith("1False")
    for choice in ("auto", "none", "required"):
        assert rendered(template, HI, tools=[TOOL], tool_choice=choice).endswith(f"1True{choice}")
    assert rendered(template, HI, tools=[TOOL], tool_choice=TOOL).endswith(str(TOOL))


def test_what_the_template_has_no_place_for_is_refused():
    assert rejection(CHATML, HI, tools=[TOOL]) == "tools: none: the model's chat template has no tools"
    assert rejection(CHATML, HI, called("{}")).startswith("messages.1.tool_calls: none")
    assert rendered(CHATML, HI, tools=[TOOL], tool_choice="none") == rendered(CHATML, HI)


def test_values_that_are_nested_too_deeply_are_refused():
    deep = "[" * 900 + "]" * 900
    for fields in ({"kwargs": {"x": json.loads(deep)}}, {"tools": [{"x": json.loads(deep)}]}):
        with pytest.raises(InvalidRequest, match=r"nested less deeply|RecursionError"):
            tokenizer_with(CHATML + "{{ tools }}").encode_chat([HI], now=NOW, **fields)
    assert "nested less deeply" in rejection(MAP_CALLS, HI, called('{"x": ' + deep + "}"))


def test_a_user_defined_token_is_found_in_content_and_a_control_token_is_not():
    metadata = byte_level(names=NAMES, extra=[("<tool_call>", USER_DEFINED)])
    tokenizer = tokenizer_of(metadata, **{"tokenizer.chat_template": CHATML})
    ids = tokenizer.encode_chat([message("user", "a<tool_call>b<|im_end|>")], now=NOW)
    special = [tokenizer.vocab.tokens[i] for i in ids if i in tokenizer.vocab.special.values()]
    assert special == ["<|im_start|>", "<tool_call>", "<|im_end|>"]


def test_a_lone_surrogate_is_refused_in_every_field():
    tokenizer = tokenizer_with(CHATML)
    for fields in ({"tools": [{"x": "\udc00"}]}, {"kwargs": {"\udc00": 1}}):
        with pytest.raises(InvalidRequest, match="lone surrogates"):
            tokenizer.encode_chat([HI], now=NOW, **fields)
