"""A Python child process for library calls that can't be interrupted, and may need any memory.

The child limits itself or is killed; the caller never waits longer than it says. Messages in both
directions are a length of 8 bytes and that many bytes. The child ends when its standard input does,
so also when its parent is killed. Used by template_process.py and grammar_checker.py.
"""

import contextlib
import os
import select
import struct
import subprocess
import sys
import time
import weakref

_START_S = 30.0
"""For the start of the interpreter, on a machine under load."""
_LENGTH = struct.Struct("<q")


class HelperEnded(Exception):
    """The child ended before it replied; `status` is its exit status, a signal's if negative."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class HelperProcess:
    """Runs `code`, which reads `first`, replies when it is ready, and then to each request.

    It is started when it is needed, again after it has ended. Not thread-safe.
    """

    def __init__(self, code: str, first: bytes) -> None:
        self._code, self._first = code, first
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., HelperProcess] | None = None
        self._is_ready = False
        self.replies = 0
        """Requests that the present child has answered."""

    @property
    def pid(self) -> int | None:
        """The child's process id, None if there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the child without waiting until it is ready. Idempotent. Raises OSError."""
        self._started()

    def request(self, data: bytes, timeout_s: float) -> bytes:
        """Send a request and return the reply.

        After an exception the child is gone. Raises TimeoutError, HelperEnded, and OSError if the
        child does not start.
        """
        process = self._ready()
        try:
            deadline = time.monotonic() + timeout_s
            _send(process, data, deadline)
            reply = _receive(process, deadline)
        except (EOFError, BrokenPipeError):
            raise HelperEnded(self._reap(process)) from None
        except BaseException:  # a reply that comes later would be taken for the next one
            self.stop()
            raise
        self.replies += 1
        return reply

    def stop(self) -> None:
        """Kill the child, if there is one, and wait for its end."""
        if self._end is not None:
            self._end()
        self._process = self._end = None
        self._is_ready, self.replies = False, 0

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"import sys; sys.path = {sys.path!r}\n{self._code}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is the parent's
        )
        self._process, self._end = process, weakref.finalize(self, _end, process)
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _ready(self) -> "subprocess.Popen[bytes]":
        process = self._started()
        if self._is_ready:
            return process
        try:
            deadline = time.monotonic() + _START_S
            _send(process, self._first, deadline)
            _receive(process, deadline)
        except (TimeoutError, EOFError, BrokenPipeError):
            self.stop()
            raise OSError("a helper process does not start") from None
        self._is_ready = True
        return process

    def _reap(self, process: "subprocess.Popen[bytes]") -> int:
        """Wait for a child that has closed its output; return its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        self.stop()
        return process.returncode


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _send(process: "subprocess.Popen[bytes]", data: bytes, deadline: float) -> None:
    """Write a message. Raises TimeoutError, and BrokenPipeError if the process has ended."""
    assert process.stdin is not None
    file, left = process.stdin.fileno(), memoryview(_LENGTH.pack(len(data)) + data)
    while left:
        _wait(file, select.POLLOUT, deadline)
        left = left[os.write(file, left) :]


def _receive(process: "subprocess.Popen[bytes]", deadline: float) -> bytes:
    """Read a message. Raises TimeoutError, and EOFError if the process has ended."""
    assert process.stdout is not None
    file = process.stdout.fileno()
    size = _LENGTH.unpack(_read(file, _LENGTH.size, deadline))[0]
    return _read(file, size, deadline)


def _read(file: int, size: int, deadline: float) -> bytes:
    parts = []
    while size:
        _wait(file, select.POLLIN, deadline)
        part = os.read(file, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _wait(file: int, event: int, deadline: float) -> None:
    poll = select.poll()  # `select` fails for the number 1024 and above
    poll.register(file, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError
