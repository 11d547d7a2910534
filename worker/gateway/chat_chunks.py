"""Parts of an answer as a chat completion: chunks of a stream, or the whole object."""

from __future__ import annotations

from typing import Any

from worker.gateway.answer import CallPart, ChoiceReader, Part
from worker.gateway.chunks import Chunks
from worker.gateway.jobs import Page
from worker.gateway.logprobs import chat_logprob
from worker.gateway.sse import to_json


def delta_of(part: Part) -> dict[str, Any]:
    """The `delta` of a chunk: role first, then text, reasoning under both names, tool calls."""
    delta: dict[str, Any] = {"role": "assistant", "content": ""} if part.begins else {}
    if part.text:
        delta["content"] = part.text
    if part.reasoning:
        delta["reasoning"] = delta["reasoning_content"] = part.reasoning
    if part.calls:
        delta["tool_calls"] = [_call_delta(call) for call in part.calls]
    return delta


def _call_delta(call: CallPart) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


class ChatChunks(Chunks):
    """The events of one streamed chat completion."""

    kind = "chat.completion.chunk"

    def choice(self, index: int, part: Part) -> str:
        """See `Chunks.choice`."""
        logprobs = "null"
        if part.logprobs:
            logprobs = to_json({"content": [chat_logprob(each) for each in part.logprobs], "refusal": None})
        reason, stop = "null", "null"
        if part.end is not None:
            reason, stop = to_json(self.readers[index].finish_reason()), to_json(part.end.stop_sequence)
        return (
            f'{{"index":{index},"delta":{to_json(delta_of(part))},"logprobs":{logprobs},'
            f'"finish_reason":{reason},"stop_reason":{stop}}}'
        )


class CollectedChoice:
    """The parts of one choice, joined: the message equals the joined deltas of a stream."""

    def __init__(self, index: int, reader: ChoiceReader) -> None:
        self.reader = reader
        self._index = index
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, list[CallPart]] = {}
        self._logprobs: list[dict[str, Any]] = []

    def add(self, page: Page) -> None:
        """Add the parts of a page."""
        for part in self.reader.read(page):
            self._text.append(part.text)
            self._reasoning.append(part.reasoning)
            self._logprobs += map(chat_logprob, part.logprobs)
            for call in part.calls:
                self._calls.setdefault(call.index, []).append(call)

    def to_api(self, *, logprobs: bool) -> dict[str, Any]:
        """An item of `choices`. The job has ended."""
        end = self.reader.end
        assert end is not None, "called at the end"
        return {
            "index": self._index,
            "message": self._message(),
            "logprobs": {"content": self._logprobs, "refusal": None} if logprobs else None,
            "finish_reason": self.reader.finish_reason(),
            "stop_reason": end.stop_sequence,
        }

    def _message(self) -> dict[str, Any]:
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        content = None if self._calls and not text else text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning"] = message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = [_whole_call(parts) for parts in self._calls.values()]
        return message


def _whole_call(parts: list[CallPart]) -> dict[str, Any]:
    function = {"name": parts[0].name, "arguments": "".join(part.arguments for part in parts)}
    return {"id": parts[0].id, "type": "function", "function": function}
