"""Streaming parsers of answers: channels of text, recipients of tool calls, one file per format."""

from collections.abc import Mapping, Sequence
from typing import Any

from worker.text.parsers.harmony import HarmonyParser
from worker.text.parsers.interface import Parser
from worker.text.tokenizer import Tokenizer


def answer_parser(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], tools: Sequence[Mapping[str, Any]] | None
) -> Parser | None:
    """Return the parser of an answer to the prompt; None if its text has no markup."""
    if HarmonyParser.supported_by(tokenizer.vocab):
        return HarmonyParser(tokenizer.vocab, tokenizer.token_bytes, prompt_ids)
    return None
