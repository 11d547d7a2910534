"""Streaming parsers of answers: channels of text, recipients of tool calls; one file per format.

`interface.py` has their protocol. `answer_parser` selects by the vocabulary and the chat template.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from worker.text.parsers.harmony import HarmonyParser
from worker.text.parsers.hermes import HermesParser
from worker.text.parsers.interface import Parser
from worker.text.parsers.qwen_xml import QwenXmlParser
from worker.text.parsers.think import ThinkParser, opens_thinking
from worker.text.tokenizer import Tokenizer


def answer_parser(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], tools: Sequence[Mapping[str, Any]] | None
) -> Parser | None:
    """Return the parser of an answer to the prompt; None if its text has no markup.

    Tool calls are parsed only in answers to jobs with tools; in harmony always.
    """
    vocab, template = tokenizer.vocab, tokenizer.template_source
    if HarmonyParser.supported_by(vocab):
        return HarmonyParser(vocab, tokenizer.token_bytes, prompt_ids)
    calls: QwenXmlParser | HermesParser | None = None
    if tools and "<function=" in template:
        calls = QwenXmlParser(tools)
    elif tools and ("<tool_call>" in template or "<tool_call>" in vocab.special):
        calls = HermesParser()
    if "<think>" not in vocab.special and "<think>" not in template:
        return calls
    return ThinkParser(
        opened=opens_thinking(tokenizer, prompt_ids),
        content=calls,
        ended_by_call=isinstance(calls, QwenXmlParser),
    )
