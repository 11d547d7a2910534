"""Chats, most with the templates of model families, some with a template of random pieces.

The templates of model families are rendered in this process, for their coverage. The others are
rendered as a worker does it: in a child process, here with smaller limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tests.fuzz.source import TEXTS, Source
from tests.text.small import byte_level, tokenizer_of
from worker.errors import InvalidRequest
from worker.text.chat import Chat
from worker.text.chat_template import ChatTemplate
from worker.text.template_process import BoundedTemplate, TemplateProcess

NOW = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
FOLDER = Path(__file__).parent.parent / "data" / "templates"
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
TEMPLATES = [
    ChatTemplate(path.read_text("utf-8"), {"bos_token": "<s>", "eos_token": "<|im_end|>"}, SPECIAL)
    for path in sorted(FOLDER.glob("*.jinja"))
]
TOKENIZER = tokenizer_of(byte_level())
HOSTILE = 77
"""First byte of a chat with a template of pieces: any other byte would make slow runs too frequent."""
ROLES = ("user", "assistant", "system", "developer", "tool")
NAMES = ("type", "function", "name", "description", "parameters", "properties", "a", "enable_thinking", "bos_token")
WORDS = ("f", "object", "string", {"type": "string"}, {"name": "f"}, "<|im_end|>", "<s>", *TEXTS[:8])
PIECES = (
    "{{ messages }}", "{{ messages[0].content }}", "{{ messages | tojson }}", "{% for m in messages %}",
    "{% endfor %}",
    "{% for i in range(9999) %}", "{{ m.content | trim }}", "{{ m['role'] ~ m.content }}", "{% if tools %}",
    "{% endif %}",
    "{% else %}", "{% set x = messages %}", "{% set x = x ~ x %}", "{% set n = namespace(x='a') %}",
    "{% set n.x = n.x ~ n.x %}", "{{ x * 9999999 }}", "{{ 'a' * 10**10 }}", "{% macro f(n) %}", "{{ f(n) }}",
    "{% endmacro %}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ '%s' % m.content }}",
    "{{ '{}'.format(messages) }}",
    "{{ messages[0].content.split('a')[-1] }}", "{{ x.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ loop.index0 }}",
    "{% break %}",
    "{{ 7 ** (10 ** 9) }}", "{{ messages | map(attribute='content') | join }}", "{{ messages[0].content[::-1] }}",
    "<|im_start|>",
    "{{ x | replace('a', x) }}", "{{ '\\ud800' }}", "{% generation %}", "{% endgeneration %}",
    "{{ x | indent(99999999) }}",
    "{% include 'x' %}", "{{", "}}", "{%", "%}", "'", "(", ")", "|", "-", "{#", "lipsum() ", "cycler(1)",
    "{{ self }}",
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    for n in range(len(TEMPLATES)):
        yield bytes([1 + 16 * (n % 8), n]) + bytes((n + i * 29) % 256 for i in range(80))
    yield bytes([HOSTILE, 0, 3, 3, 4, 6, 4]) + bytes(60)
    yield bytes([HOSTILE, 0, 6, 3, 5, 6, 4, 1, 2, 0]) + bytes(60)


def run(data: bytes) -> None:
    source = Source(data)
    template = None if source.byte() == HOSTILE and source.byte() < 128 else source.choose(TEMPLATES)
    text = "".join(source.map(lambda: source.choose(PIECES), 8)) if template is None else ""
    chat = Chat(
        [_message(source) for _ in range(1 + source.byte() % 4)],
        source.map(lambda: source.fields(NAMES, NAMES, WORDS), 2) or None,
        source.choose((None, None, "auto", "none", "required")),
        source.choose((None, {})) if source.byte() % 2 else source.fields(NAMES, NAMES, WORDS),
    )
    try:
        if template is None:
            _hostile(text, chat)
        else:
            rendered = template.render(chat, NOW)
            assert len(rendered.text) == len(rendered.text._origin)
    except InvalidRequest as error:
        error.message.encode(errors="surrogatepass")
    except RecursionError:  # `encode_chat` reports it
        return


def _message(source: Source) -> dict:
    message = {"role": source.choose(ROLES), "content": source.text()}
    if (kind := source.byte()) % 4 == 0:
        message["content"] = [{"type": "text", "text": source.text()} for _ in range(1 + source.byte() % 3)]
    if message["role"] == "assistant" and kind % 8 > 3:
        arguments = (
            source.choose(("{}", '{"a": 1}', "[", "", "null")) if kind % 16 > 7 else source.fields(NAMES, NAMES, WORDS)
        )
        function = {"name": source.text() or "f", "arguments": arguments}
        message |= {"content": None, "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}]}
    if message["role"] == "assistant" and kind % 32 > 23:
        message["reasoning_content"] = source.text()
    if message["role"] == "tool":
        message |= {"tool_call_id": "abcdefghi", "name": "f"}
    return message


def _hostile(text: str, chat: Chat) -> None:
    """As a worker does it, with limits that let most of a second to the fuzzer."""
    global _process  # noqa: PLW0603  # started when the first such template comes
    _process = _process or TemplateProcess(cpu_s=0.2, memory_bytes=64 << 20)
    TOKENIZER._template = BoundedTemplate(_process, text, {"bos_token": "<s>"}, SPECIAL)
    TOKENIZER.encode_chat(chat.messages, now=NOW, tools=chat.tools, tool_choice=chat.tool_choice, kwargs=chat.kwargs)


_process: TemplateProcess | None = None
