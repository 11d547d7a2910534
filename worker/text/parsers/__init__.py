"""Streaming parsers of answers: channels of text, recipients of tool calls; one file per format.

`interface.py` has their protocol. `answer_parser` selects by the vocabulary and the chat template,
`tool_format` and `thinks` report what it selects; `worker/text/answer_grammar.py` has the grammars
of the same formats.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from worker.text.parsers.gemma4 import CALL, Gemma4Parser, opens_channel
from worker.text.parsers.harmony import HarmonyParser
from worker.text.parsers.hermes import HermesParser
from worker.text.parsers.interface import Parser
from worker.text.parsers.leading_calls import LeadingCallsParser
from worker.text.parsers.qwen_xml import QwenXmlParser
from worker.text.parsers.think import ThinkParser, opens_thinking
from worker.text.tokenizer import Tokenizer

ToolFormat = Literal["harmony", "gemma4", "hermes", "qwen_xml"]


def tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """Return the format of the model's tool calls, None if no parser has it."""
    vocab, template = tokenizer.vocab, tokenizer.template_source
    if HarmonyParser.supported_by(vocab):
        return "harmony"
    if CALL in vocab.special or CALL in template:
        return "gemma4"
    if "<function=" in template:
        return "qwen_xml"
    if "<arg_key>" in template:  # GLM's notation has the same mark
        return None
    return "hermes" if "<tool_call>" in template or "<tool_call>" in vocab.special else None


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether an answer may begin with reasoning between `<think>` and `</think>`."""
    return "<think>" in tokenizer.vocab.special or "<think>" in tokenizer.template_source


def answer_parser(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    structured: bool = False,
) -> Parser | None:
    """Return the parser of an answer to the prompt; None if its text has no markup.

    Tool calls are parsed only in answers to jobs with tools; in harmony always. `structured`: the
    answer's content follows a grammar, and is no call if it doesn't begin with one.
    """
    form = tool_format(tokenizer)
    if form == "harmony":
        return HarmonyParser(tokenizer.vocab, tokenizer.token_bytes, prompt_ids)
    if form == "gemma4":
        return Gemma4Parser(opened=opens_channel(tokenizer, prompt_ids), calls=bool(tools), structured=structured)
    calls: QwenXmlParser | HermesParser | None = None
    if tools and form is not None:
        calls = QwenXmlParser(tools) if form == "qwen_xml" else HermesParser()
    content = LeadingCallsParser(calls) if calls and structured else calls
    if not thinks(tokenizer):
        return content
    return ThinkParser(
        opened=opens_thinking(tokenizer, prompt_ids),
        content=content,
        ended_by_call=isinstance(calls, QwenXmlParser),
    )
