"""A job's events as the events and the object of Anthropic's Messages API.

| event of the job | events of the API |
| --- | --- |
| `started` | `message_start` with the tokens of the prompt |
| token | `content_block_start`, `content_block_delta`, `content_block_stop` |
| `end` | `message_delta` with stop reason and usage, `message_stop` |
| `error` | the caller reports it |

An answer is `thinking`, `text` and `tool_use` blocks. As in Anthropic's API `usage.input_tokens`
does not count the tokens that were found in the prefix cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from worker.gateway.answer_parts import AnswerPart, AnswerParts, Change, Closed, Delta, Opened
from worker.jobs.events import End, Started, Token
from worker.jobs.reader import StreamEvent

ApiEvent = dict[str, Any]
PREFIX = "msg_"
"""Of the ids of messages and their jobs."""
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "stop_sequence": "stop_sequence"}


class MessageEvents:
    """Translates the events of one job; `message` is the object as of the last event.

    The job has the message's id.
    """

    def __init__(self, message_id: str, model: str, *, shows_thinking: bool, parallel_calls: bool = True) -> None:
        self._suffix = message_id.removeprefix(PREFIX)
        self._shows_thinking = shows_thinking
        self._parts = AnswerParts(parallel_calls=parallel_calls)
        self._blocks: list[dict[str, Any]] = []
        self._index_of: dict[int, int] = {}
        """Indices of the blocks by those of the parts: hidden parts have no block."""
        self.message: dict[str, Any] = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {},
        }

    def add(self, item: StreamEvent) -> Iterator[ApiEvent]:
        """Yield the events of one event of the job. Errors yield none."""
        event = item.event
        if isinstance(event, Token):
            yield from self._changes(self._parts.add(event))
        elif isinstance(event, Started):
            self.message["usage"] = {
                "input_tokens": event.prompt_tokens - event.cached_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": event.cached_tokens,
                "output_tokens": 0,
            }
            usage = dict(self.message["usage"])
            yield {"type": "message_start", "message": self.message | {"content": [], "usage": usage}}
        elif isinstance(event, End):
            yield from self._end(event)

    def _end(self, end: End) -> Iterator[ApiEvent]:
        yield from self._changes(self._parts.close())
        reason = _STOP_REASONS[end.finish_reason]
        if reason == "end_turn" and self._parts.has_calls:
            reason = "tool_use"
        usage = self.message["usage"] | {"output_tokens": end.tokens_out}
        self.message |= {"stop_reason": reason, "stop_sequence": end.stop_sequence, "usage": usage}
        delta = {"stop_reason": reason, "stop_sequence": end.stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": dict(usage)}
        yield {"type": "message_stop"}

    def _changes(self, changes: Iterator[Change]) -> Iterator[ApiEvent]:
        for change in changes:
            part = change.part
            if part.channel == "reasoning" and not self._shows_thinking:
                continue
            if isinstance(change, Opened):
                yield self._opened(part)
            elif isinstance(change, Delta):
                yield {
                    "type": "content_block_delta",
                    "index": self._index_of[part.index],
                    "delta": _delta(part, change.text),
                }
            elif isinstance(change, Closed):
                yield from self._closed(part)

    def _opened(self, part: AnswerPart) -> ApiEvent:
        index = self._index_of[part.index] = len(self._blocks)
        block = self._block(part, is_complete=False)
        self._blocks.append(block)
        return {"type": "content_block_start", "index": index, "content_block": block}

    def _closed(self, part: AnswerPart) -> Iterator[ApiEvent]:
        index = self._index_of[part.index]
        self._blocks[index] = self._block(part, is_complete=True)
        if part.channel == "reasoning":
            signature = {"type": "signature_delta", "signature": self._blocks[index]["signature"]}
            yield {"type": "content_block_delta", "index": index, "delta": signature}
        yield {"type": "content_block_stop", "index": index}

    def _block(self, part: AnswerPart, *, is_complete: bool) -> dict[str, Any]:
        if part.channel == "tool":
            arguments = _arguments(part.text) if is_complete else {}
            return {"type": "tool_use", "id": self._call_id(part), "name": part.name, "input": arguments}
        if part.channel == "reasoning":
            thinking = part.text if is_complete else ""
            return {"type": "thinking", "thinking": thinking, "signature": _signature(thinking)}
        return {"type": "text", "text": part.text if is_complete else ""}

    def _call_id(self, part: AnswerPart) -> str:
        return f"toolu_{self._suffix}_{part.call or 0}"


def _delta(part: AnswerPart, text: str) -> dict[str, str]:
    if part.channel == "tool":
        return {"type": "input_json_delta", "partial_json": text}
    if part.channel == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments as a map. Text that is no JSON object is kept under `raw_arguments`."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # `loads` takes NaN and lone surrogates
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"raw_arguments": text}


def _signature(thinking: str) -> str:
    """A digest: some clients drop reasoning without a signature. It is not verified."""
    return base64.b64encode(hashlib.sha256(thinking.encode()).digest()).decode() if thinking else ""
