"""The one thread that owns the engine and its device. Everything that touches either runs here, between two steps.

The event loop asks through `call`, `begin`, `add` and `abort`; drawn tokens come back through an `Inbox` a sequence,
which is where the two threads meet. It knows nothing of jobs or text; `answering.py` is the other end of an inbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar, cast

from worker.engine import Engine, Sequence, Token

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token of the inbox's sequence, and when its step ended, by `time.monotonic`."""

    token: Token
    at: float


class Inbox:
    """What the engine says of one sequence: drawn tokens, or the exception that ended it.

    The engine's thread puts, the event loop takes; `wake` is called on the loop, once for all that came together.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = wake
        self._items: deque[Drawn | Exception] = deque()
        self._told = False

    def put(self, item: Drawn | Exception) -> None:
        """Add an item, from the engine's thread."""
        self._items.append(item)
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._wake)

    def take(self) -> list[Drawn | Exception]:
        """Everything that came since the last call, on the event loop."""
        self._told = False  # before looking: what comes from here on wakes the loop again
        return [self._items.popleft() for _ in range(len(self._items))]


class EngineThread:
    """Runs an engine that is made on its own thread. A daemon: a device that hangs can't keep the process alive."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps that ended; for the watchdog."""
        self._engine: Engine | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._untold: deque[Callable[[], None]] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a sequence is being computed."""
        return bool(self._inboxes)

    def call(self, work: Callable[[], T], *, on_launched: bool = False) -> asyncio.Future[T]:
        """The result of `work`, which runs on the engine's thread between two steps.

        The thread is asked at once, not when the caller awaits: a turn of the loop earlier. `on_launched` keeps a
        result, but no error, until the device is at work on the next step, or there is none.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, result, error)

        def settle(result: T | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(cast("T", result))

        def run() -> None:
            if done.cancelled():
                return
            try:
                result = work()
            except BaseException as error:  # it belongs to the caller, whatever it is
                tell(None, error)
                return
            if on_launched:
                self._untold.append(lambda: tell(result, None))
            else:
                tell(result, None)

        self._work.put(run)
        return done

    def own(self, engine: Engine) -> asyncio.Future[None]:
        """From now on, step this engine whenever it has work."""

        def take() -> None:
            self._engine = engine

        return self.call(take)

    def add(self, sequence: Sequence, inbox: Inbox) -> asyncio.Future[None]:
        """Start a sequence. Raises InvalidRequest as `Engine.add` does."""
        return self.call(lambda: self._add(sequence, inbox))

    def begin(self, sequence: Sequence, inbox: Inbox) -> asyncio.Future[int]:
        """`reserve` and `add` in one visit; how many tokens of the prompt are cached. The first step follows at once.

        The caller hears of it when the device is at work: woken before, the loop would take Python's lock from the
        thread that has yet to launch the prompt. Raises InvalidRequest as `Engine.add` does, at once; `release` gives
        up what is reserved then.
        """

        def begin() -> int:
            cached = self._owned().reserve(sequence.id, sequence.prompt)
            self._add(sequence, inbox)
            return cached

        return self.call(begin, on_launched=True)

    def reserve(self, sequence_id: str, prompt: list[int]) -> asyncio.Future[int]:
        """Keep what is cached of a prompt until `release`; how many tokens. See `Engine.reserve`."""
        return self.call(lambda: self._owned().reserve(sequence_id, prompt))

    def release(self, sequence_id: str) -> None:
        """Give up a sequence or what is reserved for it, soon: this waits for nothing, as the device may hang."""
        self._work.put(lambda: self._abort(sequence_id))

    def abort(self, sequence_id: str) -> asyncio.Future[None]:
        """Forget a sequence and free its memory; harmless if there is none. Done after the step that runs now."""
        return self.call(lambda: self._abort(sequence_id))

    def stop(self) -> None:
        """End the thread after its step, letting the engine go. Does not wait for it."""
        self._work.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            if self._engine is None or self._engine.idle or not self._work.empty():
                if self._work.empty():  # no step comes: what was begun is given up again
                    self._tell()
                work = self._work.get()
                if work is None:
                    self._tell()
                    self._engine = None
                    return
                work()
            else:
                self._step(self._engine)

    def _step(self, engine: Engine) -> None:
        try:
            tokens = engine.step(self._tell)
        except Exception as error:
            # No sequence can go on, and each must be gone from the engine before anybody hears of it.
            inboxes, self._inboxes = self._inboxes, {}
            for sequence_id in inboxes:
                engine.abort(sequence_id)
            for inbox in inboxes.values():
                inbox.put(error)
            return
        finally:
            self._tell()  # the step waited for nothing, or came to nothing
        at = time.monotonic()
        self.steps += 1
        for token in tokens:
            if token.sequence_id in self._inboxes:
                self._inboxes[token.sequence_id].put(Drawn(token, at))
            if token.finish:
                self._inboxes.pop(token.sequence_id, None)

    def _tell(self) -> None:
        """Let callers hear what was kept from them until the device is at work."""
        while self._untold:
            self._untold.popleft()()

    def _add(self, sequence: Sequence, inbox: Inbox) -> None:
        self._owned().add(sequence)
        self._inboxes[sequence.id] = inbox

    def _abort(self, sequence_id: str) -> None:
        self._inboxes.pop(sequence_id, None)
        self._owned().abort(sequence_id)

    def _owned(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("no engine yet: `own` comes first")
        return self._engine
