"""The deltas of an answer as a chat completion: chunks of a stream, or the whole object."""

from __future__ import annotations

from typing import Any

from worker.gateway.answer import CallDelta, ChoiceDelta, ChoiceReader
from worker.gateway.chunks import Chunks
from worker.gateway.jobs import EventPage
from worker.gateway.logprobs import chat_logprob
from worker.gateway.sse import to_json


def delta_fields(delta: ChoiceDelta) -> dict[str, Any]:
    """The `delta` of a chunk: role first, then text, reasoning under both names, tool calls."""
    fields: dict[str, Any] = {"role": "assistant", "content": ""} if delta.begins else {}
    if delta.text:
        fields["content"] = delta.text
    if delta.reasoning:
        fields["reasoning"] = fields["reasoning_content"] = delta.reasoning
    if delta.calls:
        fields["tool_calls"] = [_call_fields(call) for call in delta.calls]
    return fields


def _call_fields(call: CallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


class ChatChunks(Chunks):
    """The events of one streamed chat completion."""

    kind = "chat.completion.chunk"

    def choice(self, index: int, delta: ChoiceDelta) -> str:
        """See `Chunks.choice`."""
        logprobs = "null"
        if delta.logprobs:
            logprobs = to_json({"content": [chat_logprob(each) for each in delta.logprobs], "refusal": None})
        reason, stop = "null", "null"
        if delta.end is not None:
            reason, stop = to_json(self.readers[index].finish_reason()), to_json(delta.end.stopped_by)
        return (
            f'{{"index":{index},"delta":{to_json(delta_fields(delta))},"logprobs":{logprobs},'
            f'"finish_reason":{reason},"stop_reason":{stop}}}'
        )


class CollectedChoice:
    """The deltas of one choice, joined: the message equals the joined deltas of a stream."""

    def __init__(self, index: int, reader: ChoiceReader) -> None:
        self.reader = reader
        self._index = index
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, list[CallDelta]] = {}
        self._logprobs: list[dict[str, Any]] = []

    def add(self, page: EventPage) -> None:
        """Add the deltas of a page."""
        for delta in self.reader.read(page):
            self._text.append(delta.text)
            self._reasoning.append(delta.reasoning)
            self._logprobs += map(chat_logprob, delta.logprobs)
            for call in delta.calls:
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
            "stop_reason": end.stopped_by,
        }

    def _message(self) -> dict[str, Any]:
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        content = None if self._calls and not text else text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning"] = message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = [_whole_call(deltas) for deltas in self._calls.values()]
        return message


def _whole_call(deltas: list[CallDelta]) -> dict[str, Any]:
    function = {"name": deltas[0].name, "arguments": "".join(delta.arguments for delta in deltas)}
    return {"id": deltas[0].id, "type": "function", "function": function}
