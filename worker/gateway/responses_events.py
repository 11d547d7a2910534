"""A job's events as the events and the object of the Responses API.

The events and their sequence numbers are a function of the stored request and the job's events, so
every gateway that reads the job again gives the same ones, and `starting_after` continues them.

| event of the job | events of the API |
| --- | --- |
| (before the first) | `response.created`, in the background also `response.queued` |
| `started` | `response.in_progress` |
| token | added, delta and done events of items and their content parts |
| `end` | `response.completed`, or `response.incomplete` if a limit ended the answer |
| `error` | `response.failed`, with the status `cancelled` if the job was cancelled |
| others | none |

An answer is `reasoning` items, `message` items of one text part each, and `function_call` items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from worker.gateway.answer import call_id
from worker.gateway.answer_parts import AnswerPart, AnswerParts, Change, Closed, Delta, Opened
from worker.gateway.logprobs import AlignedTokens, Entry, chat_logprob
from worker.jobs.events import End, ErrorEvent, Started, Token
from worker.jobs.reader import StreamEvent

ApiEvent = dict[str, Any]
PREFIX = "resp_"
"""Of the ids of responses and their jobs."""
_PREFIXES = {"final": "msg", "reasoning": "rs", "tool": "fc"}
_DELTAS = {
    "final": "response.output_text.delta",
    "reasoning": "response.reasoning_text.delta",
    "tool": "response.function_call_arguments.delta",
}


class ResponseEvents:
    """Translates the events of one job; `response` is the object as of the last event.

    `echo` has the fields of the object that repeat the request. The job has the response's id.
    """

    def __init__(
        self, response_id: str, echo: Mapping[str, Any], created_s: int, *, background: bool, logprobs: bool
    ) -> None:
        self._suffix = response_id.removeprefix(PREFIX)
        self._aligned = AlignedTokens() if logprobs else None
        self._logprobs: dict[int, list[dict[str, Any]]] = {}
        """Log-probabilities of the parts of text, by their index."""
        self._background = background
        self._sequence = 0
        self._parts = AnswerParts(parallel_calls=bool(echo.get("parallel_tool_calls", True)))
        self._items: list[dict[str, Any]] = []
        self._cached_tokens = 0
        self.is_over = False
        self.response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": created_s,
            "status": "queued" if background else "in_progress",
            "background": background,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **echo,
        }

    def begin(self) -> Iterator[ApiEvent]:
        """Yield the events before those of the job."""
        yield self._lifecycle("response.created")
        if self._background:
            yield self._lifecycle("response.queued")

    def add(self, item: StreamEvent) -> Iterator[ApiEvent]:
        """Yield the events of one event of the job."""
        event = item.event
        if isinstance(event, Token):
            yield from self._changes(self._parts.add(event))
        elif isinstance(event, Started):
            self._cached_tokens = event.cached_tokens
            self.response["status"] = "in_progress"
            yield self._lifecycle("response.in_progress")
        elif isinstance(event, End):
            yield from self._end(event, item.envelope.ts_ms // 1000)
        elif isinstance(event, ErrorEvent):
            yield from self.fail(event)

    def _end(self, end: End, time_s: int) -> Iterator[ApiEvent]:
        complete = end.finish_reason != "length"
        yield from self._changes(self._parts.close(), "completed" if complete else "incomplete")
        if complete and not any(item["type"] != "reasoning" for item in self._items):
            yield from self._empty_message()
        self.response["usage"] = self._usage(end)
        if complete:
            self.response |= {"status": "completed", "completed_at": time_s}
        else:
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        yield self._terminal()

    def fail(self, error: ErrorEvent) -> Iterator[ApiEvent]:
        """Yield the events of a job's error."""
        yield from self._changes(self._parts.close(), "incomplete")
        if error.code == "CANCELLED":
            self.response["status"] = "cancelled"
        else:
            code = "invalid_prompt" if error.code == "INVALID_REQUEST" else "server_error"
            self.response |= {"status": "failed", "error": {"code": code, "message": f"{error.code}: {error.message}"}}
        yield self._terminal()

    def error(self, code: str | None, message: str, param: str | None) -> ApiEvent:
        """The event of an error that ends the stream, but not the response."""
        return self._event("error", code=code, message=message, param=param)

    def _terminal(self) -> ApiEvent:
        self.is_over = True
        kinds = {"completed": "response.completed", "incomplete": "response.incomplete"}
        return self._lifecycle(kinds.get(self.response["status"], "response.failed"))

    def _usage(self, end: End) -> dict[str, Any]:
        return {
            "input_tokens": end.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self._cached_tokens, "cache_write_tokens": 0},
            "output_tokens": end.tokens_out,
            "output_tokens_details": {"reasoning_tokens": self._parts.reasoning_tokens},
            "total_tokens": end.prompt_tokens + end.tokens_out,
        }

    def _changes(self, changes: Iterator[Change], status: str = "completed") -> Iterator[ApiEvent]:
        for change in changes:
            if isinstance(change, Opened):
                yield from self._opened(change.part)
            elif isinstance(change, Delta):
                yield self._delta(change)
            elif isinstance(change, Closed):
                yield from self._closed(change.part, status)

    def _opened(self, part: AnswerPart) -> Iterator[ApiEvent]:
        item = self._item(part, "in_progress", self._content(part, empty=True))
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=part.index, item=self._without_content(item))
        if part.channel != "tool":
            yield self._content_event("response.content_part.added", part, part=item["content"][0])

    def _delta(self, change: Delta) -> ApiEvent:
        part, kind = change.part, _DELTAS[change.part.channel]
        if part.channel == "tool":
            return self._event(kind, item_id=self._id(part), output_index=part.index, delta=change.text)
        extra = {"logprobs": self._add_logprobs(part, change.tokens)} if part.channel == "final" else {}
        return self._content_event(kind, part, delta=change.text, **extra)

    def _closed(self, part: AnswerPart, status: str) -> Iterator[ApiEvent]:
        if part.channel == "final":
            self._add_logprobs(part, (), last=True)
        item = self._items[part.index] = self._item(part, status, self._content(part))
        if part.channel == "tool":
            done = {"item_id": item["id"], "output_index": part.index, "name": part.name}
            yield self._event("response.function_call_arguments.done", **done, arguments=part.text)
        else:
            if part.channel == "final":
                logprobs = self._logprobs.get(part.index, [])
                yield self._content_event("response.output_text.done", part, text=part.text, logprobs=logprobs)
            else:
                yield self._content_event("response.reasoning_text.done", part, text=part.text)
            yield self._content_event("response.content_part.done", part, part=item["content"][0])
        self.response["output"] = self._items[: part.index + 1]
        yield self._event("response.output_item.done", output_index=part.index, item=item)

    def _empty_message(self) -> Iterator[ApiEvent]:
        """The message of an answer without any text: clients expect one."""
        part = AnswerPart("final", len(self._items))
        yield from self._opened(part)
        yield from self._closed(part, "completed")

    def _item(self, part: AnswerPart, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        shared = {"id": self._id(part), "status": status}
        if part.channel == "tool":
            arguments = part.text if status != "in_progress" else ""
            identity = {"call_id": call_id(self.response["id"], part.call or 0), "name": part.name}
            return {"type": "function_call", **shared, **identity, "arguments": arguments}
        if part.channel == "reasoning":
            return {"type": "reasoning", **shared, "summary": [], "content": content}
        return {"type": "message", **shared, "role": "assistant", "content": content}

    def _content(self, part: AnswerPart, *, empty: bool = False) -> list[dict[str, Any]]:
        text = "" if empty else part.text
        if part.channel == "reasoning":
            return [{"type": "reasoning_text", "text": text}]
        logprobs = [] if empty else self._logprobs.get(part.index, [])
        return [{"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}]

    @staticmethod
    def _without_content(item: dict[str, Any]) -> dict[str, Any]:
        """The item as it is added: its content follows in events of its own."""
        return item | {"content": []} if "content" in item else item

    def _id(self, part: AnswerPart) -> str:
        return f"{_PREFIXES[part.channel]}_{self._suffix}_{part.index}"

    def _add_logprobs(self, part: AnswerPart, tokens: Sequence[Token], *, last: bool = False) -> list[dict[str, Any]]:
        """The log-probabilities that `tokens`, or the end of the part, make complete."""
        if self._aligned is None:
            return []
        entries: list[Entry] = [entry for token in tokens for entry in self._aligned.push(token)]
        entries += self._aligned.flush() if last else []
        added = [chat_logprob(entry) for entry in entries]
        self._logprobs.setdefault(part.index, []).extend(added)
        return added

    def _content_event(self, kind: str, of: AnswerPart, **fields: Any) -> ApiEvent:
        place = {"item_id": self._id(of), "output_index": of.index, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _lifecycle(self, kind: str) -> ApiEvent:
        return self._event(kind, response=dict(self.response))

    def _event(self, kind: str, **fields: Any) -> ApiEvent:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event
