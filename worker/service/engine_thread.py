"""The thread that owns the engine and its device. Every access to either runs here.

The event loop submits work by `call`, `add`, `resume` and `abort`, which runs between two steps.
Drawn tokens return through one `Inbox` a sequence. The event loop is not woken for each token: it
reads an inbox some time after its first item, or at once when it becomes urgent. No jobs and no
text; `generation.py` reads the inboxes.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeAlias, TypeVar

from worker.engine import DrawnToken, Engine, FailedSequence, Sequence
from worker.errors import as_exception
from worker.service.pacing import Pacing

T = TypeVar("T")


TimedToken: TypeAlias = tuple[DrawnToken, float]
"""A drawn token and the end of its step, by `time.monotonic`."""


class Inbox:
    """A sequence's tokens, and the exception that ended it.

    The engine's thread writes and the event loop reads. `wake` is called on the event loop: once
    when items arrive after a `take`, and once more when the inbox becomes urgent. It is urgent with
    `limit` items, with the last token, and after a fault.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.limit = 1
        self.urgent = False
        self.error: Exception | None = None
        """Why the sequence ended without a last token. Read it before `take`."""
        self._announced = False
        self._items: list[TimedToken] = []

    def put(self, token: DrawnToken, at: float) -> bool:
        """Add a token; returns whether `wake` must be called. Called on the engine's thread."""
        items = self._items
        items.append((token, at))
        if not self.urgent and (len(items) >= self.limit or token.finish is not None):
            self.urgent = self._announced = True
            return True
        if self._announced:
            return False
        self._announced = True
        return True

    def fail(self, error: Exception) -> None:
        """End the sequence; the caller has `wake` called. Called on the engine's thread."""
        self.error = error
        self.urgent = self._announced = True

    def take(self) -> list[TimedToken]:
        """Remove and return all items."""
        # Before reading the items: one that comes later must wake the event loop again.
        self.urgent = self._announced = False
        items = self._items
        taken = items[:]
        del items[: len(taken)]  # the engine's thread may have appended others
        return taken


class EngineThread:
    """Runs an engine that is created on its own thread.

    A daemon thread: a device that hangs cannot keep the process alive.
    """

    def __init__(self) -> None:
        self.steps = 0
        """Completed steps; read by the watchdog."""
        self._engine: Engine | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken: deque[Inbox] = deque()
        self._announced = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._launch_callbacks: deque[Callable[[], None]] = deque()
        self._pacing = Pacing()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs; paused ones do not count."""
        engine = self._engine
        return engine is not None and not engine.idle

    @property
    def waiting(self) -> int:
        """Sequences that wait for KV blocks or a slot; paused ones do not count."""
        engine = self._engine
        return 0 if engine is None else engine.sequences[1]

    def call(self, work: Callable[[], T], *, on_launched: bool = False) -> asyncio.Future[T]:
        """Run `work` on the engine's thread between two steps; returns its future result.

        `work` is submitted at once, not when the caller awaits. With `on_launched` the result, but
        not an exception, is delivered when the next step is launched on the device, or when there
        is none.
        """
        future: Future[T] = Future()
        delivered = asyncio.wrap_future(future)

        def run() -> None:
            if delivered.cancelled() or not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except BaseException as error:
                future.set_exception(as_exception(error))
                return
            if on_launched:
                self._launch_callbacks.append(partial(future.set_result, result))
            else:
                future.set_result(result)

        self._work.put(run)
        return delivered

    def own(self, engine: Engine) -> asyncio.Future[None]:
        """Step this engine from now on, whenever it has work."""
        return self.call(lambda: setattr(self, "_engine", engine))

    def add(self, sequence: Sequence, inbox: Inbox, *, paused: bool = False) -> asyncio.Future[int]:
        """Add a sequence; returns its cached prompt tokens. See `Engine.add`.

        The result of a sequence that is not paused is delivered when the device runs its first
        step: if the loop woke earlier, it would take the GIL from the thread that is about to
        launch. Raises InvalidRequest immediately.
        """

        self._loop = asyncio.get_running_loop()

        def add() -> int:
            cached = self._owned().add(sequence, paused=paused)
            self._inboxes[sequence.id] = inbox
            return cached

        return self.call(add, on_launched=not paused)

    def resume(self, sequence: Sequence) -> asyncio.Future[None]:
        """Queue the final form of a paused sequence. See `Engine.resume`."""
        return self.call(lambda: self._owned().resume(sequence))

    def abort(self, sequence_id: str) -> asyncio.Future[None]:
        """Remove a sequence and release its memory, after the current step. See `Engine.abort`."""
        return self.call(lambda: self._abort(sequence_id))

    def release(self, sequence_id: str) -> None:
        """As `abort`, without a result to wait for, since the device may hang."""
        self._work.put(lambda: self._abort(sequence_id))

    def stop(self) -> None:
        """End the thread after the current step and drop the engine. Does not wait."""
        self._work.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            engine = None if self._engine is None or self._engine.idle else self._engine
            if engine is None and self._work.empty():  # no step follows: the added sequences were aborted
                self._run_launch_callbacks()
            try:
                work = self._work.get(timeout=None if engine is None else self._delay_s(engine))
            except Empty:
                assert engine is not None
                self._step(engine)
                continue
            if work is None:
                self._run_launch_callbacks()
                self._engine = None
                return
            work()

    def _delay_s(self, engine: Engine) -> float:
        """For how long to wait for work before the next step."""
        return max(0.0, self._pacing.due_at - time.monotonic()) if engine.has_room else 0.0

    def _step(self, engine: Engine) -> None:
        try:
            tokens = engine.first_tokens() or self._launch_step(engine)
        except BaseException as raised:
            error = as_exception(raised)
            # No started sequence can continue; each is aborted before its inbox gets the error.
            failed = [(each, self._inboxes.pop(each)) for each in engine.active if each in self._inboxes]
            for sequence_id, _ in failed:
                engine.abort(sequence_id)
            for _, inbox in failed:
                inbox.fail(error)
            self._wake([inbox for _, inbox in failed])
            return
        self.steps += 1
        self._distribute(tokens, time.monotonic())

    def _launch_step(self, engine: Engine) -> list[DrawnToken | FailedSequence]:
        began_at = time.monotonic()
        try:
            return engine.step(self._run_launch_callbacks)
        finally:
            self._run_launch_callbacks()  # the step launched nothing, or failed before it launched
            self._pacing.stepped(began_at, engine.step_wait)

    def _distribute(self, tokens: Iterable[DrawnToken | FailedSequence], at: float) -> None:
        """Put what a step has drawn into the inboxes."""
        inboxes = self._inboxes
        woken: list[Inbox] = []
        for token in tokens:
            inbox = inboxes.get(token.sequence_id)
            if inbox is None:
                continue
            if isinstance(token, FailedSequence):
                inbox.fail(token.error)
                woken.append(inbox)
                del inboxes[token.sequence_id]
                continue
            if inbox.put(token, at):
                woken.append(inbox)
            if token.finish is not None:
                del inboxes[token.sequence_id]
        self._wake(woken)

    def _wake(self, inboxes: list[Inbox]) -> None:
        """Have the event loop call `wake` of these inboxes, which it does for all that wait."""
        if not inboxes or self._loop is None:
            return
        self._woken.extend(inboxes)
        if not self._announced:
            self._announced = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._announced = False  # before reading: an inbox that comes later must wake the loop again
        woken: dict[Inbox, None] = {}
        while self._woken:
            woken[self._woken.popleft()] = None
        for inbox in woken:
            inbox.wake()

    def _run_launch_callbacks(self) -> None:
        while self._launch_callbacks:
            self._launch_callbacks.popleft()()

    def _abort(self, sequence_id: str) -> None:
        self._inboxes.pop(sequence_id, None)
        self._owned().abort(sequence_id)

    def _owned(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("no engine yet: call `own` first")
        return self._engine
