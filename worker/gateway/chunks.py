"""Chunks of a streamed completion, of chats or of text, each with the position to resume at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from worker.gateway.answer import ChoiceDelta, ChoiceReader, usage_of
from worker.gateway.errors import fields_named
from worker.gateway.jobs import EventPage, JobGroup, Position
from worker.gateway.sse import DONE, encode, to_json
from worker.jobs.keys import START


class Chunks(ABC):
    """The events of one streamed response of several choices.

    A client that resumes is sent the chunks that follow its position.
    """

    kind: ClassVar[str]
    """The `object` of a chunk."""

    def __init__(
        self, group: JobGroup, readers: Sequence[ChoiceReader], model: str, *, include_usage: bool, prompts: int = 1
    ) -> None:
        self.readers = readers
        self._group = group
        self._model = model
        self._include_usage = include_usage
        self._prompts = prompts
        self._received = list(group.resumed.steps) if group.resumed else [0] * len(readers)
        self._steps = list(self._received)
        self._entry_id = group.resumed.entry_id if group.resumed else START
        self._head = ""

    @abstractmethod
    def choice(self, index: int, delta: ChoiceDelta) -> str:
        """The item of `choices` for a delta, as JSON."""

    def of_page(self, index: int, page: EventPage) -> bytes:
        """The encoded chunks of a page of choice `index`; may be empty."""
        chunks = []
        for delta in self.readers[index].read(page, self._received[index]):
            for earlier in range(index):
                if not self._steps[earlier]:  # OpenAI's client needs the choices to begin in order
                    self._received[earlier] = 1
                    chunks.append(self._encode(earlier, ChoiceDelta(1, delta.entry_id, begins=True)))
            chunks.append(self._encode(index, delta))
        return b"".join(chunks)

    def _encode(self, index: int, delta: ChoiceDelta) -> bytes:
        self._steps[index], self._entry_id = delta.step, delta.entry_id
        return encode(self._chunk(self.choice(index, delta)), self._event_id())

    def usage(self) -> bytes:
        """The chunk with the usage, if it is requested; called after the last choice has ended."""
        finished = self.readers[0].end
        assert finished is not None, "called at the end"
        self._steps[0] = finished.tokens_out + 3
        if not self._include_usage or self._received[0] >= self._steps[0]:
            return b""
        usage = to_json(usage_of(self.readers, self._prompts).to_api())
        return encode(self._chunk("", usage), self._event_id())

    def _chunk(self, choice: str, usage: str = "null") -> str:
        if not self._head:
            self._head = to_json(head(self._group.id, self.kind, self._model, self.readers))[:-1]
        return f'{self._head},"choices":[{choice}]' + (f',"usage":{usage}}}' if self._include_usage else "}")

    def _event_id(self) -> str:
        return str(Position(self._group.id, self._entry_id, tuple(self._steps)))


async def stream(group: JobGroup, chunks: Chunks, names: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    """Run the jobs of a group; yield their chunks, the usage and the end mark.

    Errors have the request's `names` of fields, see `fields_named`.
    """
    try:
        with fields_named(names):
            await group.start()
            async with aclosing(group.pages()) as pages:
                async for index, page in pages:
                    if encoded := chunks.of_page(index, page):
                        yield encoded
        yield chunks.usage() + DONE
    finally:
        group.close()


def head(group_id: str, kind: str, model: str, readers: Sequence[ChoiceReader]) -> dict[str, Any]:
    """The first fields of a completion or of a chunk; one choice at least has started."""
    started = next(reader.started for reader in readers if reader.started is not None)
    return {
        "id": group_id,
        "object": kind,
        "created": started.enqueued_at // 1000,
        "model": model,
        "system_fingerprint": started.fingerprint,
    }
