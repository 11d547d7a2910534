"""The start that an attempt makes on an answer before it knows whether the job is its to answer.

Almost always nobody has begun a job whose queue entry is delivered for the first time. So its prompt goes to the engine
first, and `take` is asked for once the device is at work: a job waits for the longer of the two and not for both.
Nothing that is drawn is looked at before `take` has given the lease; where it gives none, or a history to continue, the
start is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.answer import Answer
from worker.errors import CudaError
from worker.jobs.lease import History
from worker.runtime import LoadedModel
from worker.service.bounds import Bounds
from worker.service.engine_thread import EngineThread, Inbox
from worker.service.question import Question


@dataclass(frozen=True, slots=True)
class HeadStart:
    """An answer from its beginning, on the engine already, and where its tokens arrive."""

    answer: Answer
    inbox: Inbox
    cached_tokens: int
    """How many of the prompt's the engine found in the prefix cache and does not compute."""

    @classmethod
    async def of(cls, question: Question, served: LoadedModel, engine: EngineThread, bounds: Bounds) -> HeadStart:
        """Begin the answer, and return when the device is at work on it.

        Raises as `Bounds.guard` does; whoever calls releases the job's sequence in the end.
        """
        answer, inbox = question.answer(served, History()), Inbox(bounds.wake.set)
        return cls(answer, inbox, await bounds.guard(engine.begin(answer.sequence, inbox)))

    def serves(self, history: History) -> bool:
        """Whether an attempt after `history` begins so: nothing was resolved or published before it."""
        return history.started is None

    def drop(self, engine: EngineThread) -> None:
        """Have the engine forget it, soon. Raises CudaError if the device was lost over it; nothing else matters."""
        engine.release(self.answer.sequence.id)
        for item in self.inbox.take():
            if isinstance(item, CudaError):
                raise item
