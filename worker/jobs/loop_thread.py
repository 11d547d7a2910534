"""An event loop on a thread of its own, for callers without one: `SyncClient`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import selectors
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_S = 5.0


class _Selector(selectors.DefaultSelector):
    """Has no files in a forked process, whose end would remove them from the parent's epoll."""

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return super().get_map() if self._process == os.getpid() else {}


class LoopThread:
    """Runs coroutines for any number of threads. The thread starts at the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = 0
        """The process that has the thread; 0 before the first call."""
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine to its end and return its result. An interrupt cancels it.

        Raises RuntimeError after `close`, in a process forked since, and on the loop's own thread.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a SyncClient cannot be used on its own event loop")
        future = self.start(coroutine)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the client was closed during the call") from None
        except BaseException:
            future.cancel()
            raise

    def start(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start the coroutine. Raises RuntimeError as `run` does."""
        try:
            if self._process not in (0, os.getpid()):
                raise RuntimeError("the client was used before this process was forked; create one after")
            with self._lock:  # no call is scheduled after the loop's stop, which would never end
                if self._closed:
                    raise RuntimeError("the client is closed")
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop or self._start_thread())
        except RuntimeError:
            coroutine.close()
            raise

    def close(self, last: Coroutine[Any, Any, object]) -> None:
        """Run `last`, cancel the other calls, and end the thread. No effect in a forked process."""
        if self._process == os.getpid() and not self._closed:
            with self._lock:
                self._closed = True
                assert self._loop is not None
                ending = asyncio.run_coroutine_threadsafe(last, self._loop)
            try:
                if threading.current_thread() is not self._thread:
                    concurrent.futures.wait([ending], CLOSE_S)
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                if self._thread not in (None, threading.current_thread()):
                    self._thread.join(CLOSE_S)
        else:
            self._closed = True
            last.close()

    def _start_thread(self) -> asyncio.AbstractEventLoop:
        self._loop, self._process = asyncio.SelectorEventLoop(_Selector()), os.getpid()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="worker-client", daemon=True)
        self._thread.start()
        return self._loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run until `stop`, then cancel the tasks that are left."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
