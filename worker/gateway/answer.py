"""A job's events as deltas of an answer: text, reasoning, tool calls, finish reason, usage.

The deltas are a function of the events: a client that resumes a stream is sent those above its
step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from worker.gateway.logprobs import AlignedTokens, Entry
from worker.jobs.events import Channel, End, Started, Token
from worker.jobs.reader import StreamEvent

_PREFIX = "functions."


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of a tool call's arguments; `id` and `name` with the first delta of a call."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class ChoiceDelta:
    """What one or more tokens add to a choice."""

    step: int
    """1 + tokens of the choice up to here; one more with the finish reason. See `Position`."""
    entry_id: str
    begins: bool = False
    """The first delta of the choice."""
    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)
    end: End | None = None
    """With the last delta."""


@dataclass(slots=True)
class Usage:
    """Token counts of a response."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def to_api(self) -> dict[str, object]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class ChoiceReader:
    """The deltas of one choice, from the pages of its job in order."""

    def __init__(self, job_id: str, *, logprobs: bool = False, parallel_tool_calls: bool = True) -> None:
        self.started: Started | None = None
        self.end: End | None = None
        self.reasoning_tokens = 0
        self.called = False
        """Whether the answer has a tool call."""
        self._job_id = job_id
        self._aligned = AlignedTokens() if logprobs else None
        self._parallel = parallel_tool_calls
        self._tokens = 0
        self._call: int | None = None
        """The index of the tool call whose arguments come now."""
        self._arguments_empty = False

    def read(self, page: Sequence[StreamEvent], received: int = 0) -> Iterator[ChoiceDelta]:
        """Yield the deltas of a page whose step is above `received`."""
        for is_token, items in groupby(page, lambda item: isinstance(item.event, Token)):
            if is_token:
                yield from self._read_tokens(list(items), received)
                continue
            for item in items:
                delta = self._read_event(item)
                if delta is not None and delta.step > received:
                    yield delta

    def _read_event(self, item: StreamEvent) -> ChoiceDelta | None:
        match item.event:
            case Started() as started:
                self.started = started
                return ChoiceDelta(1, item.entry_id, begins=True)
            case End() as end:
                self.end = end
                delta = ChoiceDelta(end.tokens_out + 2, item.entry_id, calls=self._close_call(), end=end)
                delta.logprobs = self._aligned.flush() if self._aligned else []
                return delta
        return None

    def _read_tokens(self, items: list[StreamEvent], received: int) -> Iterator[ChoiceDelta]:
        """The deltas of consecutive tokens: one for each run of tokens of one channel and call."""
        known = max(0, min(len(items), received - 1 - self._tokens))
        for group in (items[:known], items[known:]):
            for place, run in groupby(group, _place):
                delta = self._read_run(place, list(run))
                if delta.step > received and (delta.text or delta.reasoning or delta.calls or delta.logprobs):
                    yield delta

    def _read_run(self, place: tuple[Channel, int | None], run: list[StreamEvent]) -> ChoiceDelta:
        tokens = [item.event for item in run if isinstance(item.event, Token)]
        channel, call = place
        self._tokens += len(tokens)
        delta = ChoiceDelta(self._tokens + 1, run[-1].entry_id)
        text = "".join([token.t for token in tokens])
        if self._call is not None and (channel != "tool" or call != self._call):
            delta.calls = self._close_call()
        if channel == "tool":
            self._read_call(delta, call or 0, tokens[0].recipient or "", text)
        elif channel == "reasoning":
            self.reasoning_tokens += len(tokens)
            delta.reasoning = text
        else:
            delta.text = text
            if self._aligned is not None:
                delta.logprobs = [entry for token in tokens for entry in self._aligned.push(token)]
        return delta

    def _read_call(self, delta: ChoiceDelta, call: int, recipient: str, text: str) -> None:
        if call > 0 and not self._parallel:
            return
        if call == self._call:
            if text:
                delta.calls.append(CallDelta(call, text))
        else:
            name = recipient.removeprefix(_PREFIX)
            delta.calls.append(CallDelta(call, text, call_id(self._job_id, call), name))
            self._call, self._arguments_empty, self.called = call, True, True
        self._arguments_empty = self._arguments_empty and not text.strip()

    def _close_call(self) -> list[CallDelta]:
        """Arguments of a call that had none: an empty object."""
        call, self._call = self._call, None
        return [CallDelta(call, "{}")] if call is not None and self._arguments_empty else []

    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        """OpenAI's finish reason of the ended choice."""
        if self.end is not None and self.end.finish_reason == "length":
            return "length"
        return "tool_calls" if self.called else "stop"


def _place(item: StreamEvent) -> tuple[Channel, int | None]:
    token = item.event
    assert isinstance(token, Token), "grouped by the caller"
    return token.channel, token.call


def call_id(job_id: str, call: int) -> str:
    """The id of a tool call: the same in every reading of the job's events."""
    return "call_" + hashlib.sha256(f"{job_id}\0{call}".encode()).hexdigest()[:24]


def usage_of(readers: Sequence[ChoiceReader], prompts: int = 1) -> Usage:
    """The usage of a response whose `readers` have ended; the choices of a prompt count it once."""
    usage, choices = Usage(), len(readers) // prompts
    for index, reader in enumerate(readers):
        if reader.end is None:
            continue
        usage.completion_tokens += reader.end.tokens_out
        usage.reasoning_tokens += reader.reasoning_tokens
        if index % choices == 0:
            usage.prompt_tokens += reader.end.prompt_tokens
            usage.cached_tokens += reader.started.cached_tokens if reader.started else 0
    return usage
